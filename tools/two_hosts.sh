#!/usr/bin/env bash
# Two hosts on this machine, for development and tests: two network namespaces, each with a name
# and an address, and a link between them (a veth pair) with a rate that can be set.
#   tools/two_hosts.sh start [RATE]          create both; RATE is in tc's units (100mbit), default
#                                            no limit
#   tools/two_hosts.sh exec 0|1 COMMAND...   run a command on one host; HOST0 and HOST1 have the
#                                            addresses, and the names th-a and th-b resolve
#   tools/two_hosts.sh link up|down          restore the link, or cut it
#   tools/two_hosts.sh rate RATE|none        set the rate of the link, in each direction
#   tools/two_hosts.sh status                show both hosts; exit 1 if they do not exist
#   tools/two_hosts.sh stop                  end their processes by SIGTERM, and remove them
# Needs root and iproute2 (else exit 2). The hosts share files and CPUs with this machine, and have
# no access to its network.
set -euo pipefail

names=(th-a th-b)
addresses=(198.18.97.1 198.18.97.2)   # in the range reserved for tests between hosts
link=th0                              # the name of the link's end on each host
mark='made by two_hosts.sh'
export PATH=$PATH:/usr/sbin:/sbin     # ip and tc may lie outside of PATH

say() { echo "two_hosts: $*"; }
die() { say "$@" >&2; exit 1; }

need_iproute_and_root() {
  local lack=''
  { type -P ip && type -P tc; } >/dev/null || lack='package missing: iproute2. '
  # A container's root may lack the right to make namespaces.
  ((EUID == 0)) && unshare --net --uts true 2>/dev/null || lack+='It needs root with CAP_SYS_ADMIN.'
  [[ -z $lack ]] || { say "${lack% }" >&2; exit 2; }
}

# A mark tells what this script has created, so that it leaves everything else alone. A namespace
# has it as the alias of its loopback (a file could outlive the namespace), and a folder in
# /etc/netns has it as the first line of its file hosts.
is_ours() { [[ -e /run/netns/$1 && $(ip -n "$1" link show lo) == *"alias $mark"* ]]; }
files_are_ours() { grep -qsxF "# $mark" "/etc/netns/$1/hosts"; }
pids_inside() { for name in "${names[@]}"; do ! is_ours "$name" || ip netns pids "$name"; done; }

is_up() {   # build sets the address of the second end last
  is_ours th-a && is_ours th-b && [[ $(ip -n th-b addr show) == *"$link@"*"inet ${addresses[1]}"* ]]
}

refuse_foreign() {
  for name in "${names[@]}"; do
    [[ ! -e /run/netns/$name ]] || is_ours "$name" || die "the namespace $name is not ours"
    [[ ! -e /etc/netns/$name ]] || files_are_ours "$name" || die "/etc/netns/$name is not ours"
  done
}

set_rate() {
  for name in "${names[@]}"; do
    # The burst is much smaller than a message of a few MB.
    if [[ $1 != none ]]; then
      tc -n "$name" qdisc replace dev "$link" root tbf rate "$1" burst 128kb latency 50ms
    elif [[ $(tc -n "$name" qdisc show dev "$link") == *tbf* ]]; then
      tc -n "$name" qdisc del dev "$link" root
    fi
  done
}

set_link() { for name in "${names[@]}"; do ip -n "$name" link set "$link" "$1"; done; }

tear_down() {   # removing the namespaces removes the link
  for name in "${names[@]}"; do
    ! is_ours "$name" || ip netns del "$name"
    ! files_are_ours "$name" || rm -r "/etc/netns/$name"
  done
  rmdir /etc/netns 2>/dev/null || true   # keeps the folder if it has other files
}

build() {
  for name in "${names[@]}"; do
    ip netns add "$name"
    ip -n "$name" link set lo up alias "$mark"
    # `ip netns exec` shows these files in place of those in /etc. The hosts reach no name server:
    # with the machine's resolv.conf, a name that is not in hosts would take over ten seconds.
    mkdir -p "/etc/netns/$name"
    printf '%s\n' "# $mark" "${addresses[0]} th-a" "${addresses[1]} th-b" >"/etc/netns/$name/hosts"
    cat /etc/hosts >>"/etc/netns/$name/hosts"
    echo "# $mark" >"/etc/netns/$name/resolv.conf"
  done
  ip link add "$link" netns th-a type veth peer name "$link" netns th-b
  set_link up
  for host in 0 1; do ip -n "${names[host]}" addr add "${addresses[host]}/30" dev "$link"; done
}

start() {
  refuse_foreign
  if is_up; then [[ $# == 0 ]] || set_rate "$1"; say "already running${1:+, now $1}"; return; fi
  trap 'tear_down; say "not started, nothing is left" >&2' EXIT
  tear_down
  build
  set_rate "${1:-none}"
  trap - EXIT
  say "running; '$0 exec 0|1 COMMAND' runs a command in one"
}

stop() {
  refuse_foreign
  is_ours th-a || is_ours th-b || files_are_ours th-a || { say "not running"; return; }
  pids_inside | xargs -r kill -TERM 2>/dev/null || true   # some may have ended since
  SECONDS=0   # torchrun waits 30 s for its ranks
  while [[ -n $(pids_inside) ]] && ((SECONDS < 40)); do sleep 0.2; done
  if [[ -n $(pids_inside) ]]; then
    pids_inside | xargs -r ps -o pid=,args= -p >&2 || true
    die "these processes did not end by SIGTERM: nothing removed"
  fi
  tear_down
  say "stopped"
}

status() {
  for host in 0 1; do
    local name=${names[host]} is=down rate=none
    [[ $(ip -n "$name" link show "$link") != *LOWER_UP* ]] || is=up
    [[ ! $(tc -n "$name" qdisc show dev "$link") =~ rate\ ([^ ]+) ]] || rate=${BASH_REMATCH[1]}
    say "host $host: $name, ${addresses[host]}, link $is, rate $rate," \
      "$(ip netns pids "$name" | wc -l) processes"
  done
}

run() {
  local name=${names[$1]}
  export HOST0=${addresses[0]} HOST1=${addresses[1]}
  export GLOO_SOCKET_IFNAME=$link NCCL_SOCKET_IFNAME=$link
  # The host name resolves to the address on the link. torchrun thus recognises the host of the
  # rendezvous, and no process gives 127.0.0.1 to the other host as its address.
  # shellcheck disable=SC2016
  exec ip netns exec "$name" unshare --uts \
    sh -c 'echo "$0" >/proc/sys/kernel/hostname && exec "$@"' "$name" "${@:2}"
}

case $#:${1-}:${2-} in
  1:start: | 2:start:?* | 1:stop: | 1:status: | 2:link:up | 2:link:down | 2:rate:?*) ;;
  [3-9]:exec:[01] | [1-9][0-9]*:exec:[01]) ;;
  *) echo "usage: $0 start [RATE]|exec 0|1 COMMAND...|link up|down|rate RATE|none|status|stop" >&2
     exit 2 ;;
esac
need_iproute_and_root
[[ $1 == exec ]] || { exec 9<"${BASH_SOURCE[0]}" && flock 9; }   # one at a time
[[ $1 == start || $1 == stop ]] || is_up || die "not running"
case $1 in
  exec) run "${@:2}" ;;
  link | rate) "set_$1" "$2" ;;
  *) "$@" ;;
esac

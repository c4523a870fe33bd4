#!/usr/bin/env bash
# Two hosts on this machine, for development and tests: network namespaces with names and addresses
# of their own, joined by a link (a veth pair) whose rate can be set and which can be cut.
#   tools/two_hosts.sh start [RATE]          make them; RATE as tc takes it (100mbit), else no limit
#   tools/two_hosts.sh exec 0|1 COMMAND...   run it in one; it sees the addresses as HOST0, HOST1,
#                                            and the names th-a and th-b resolve
#   tools/two_hosts.sh link up|down          restore the link, or cut it
#   tools/two_hosts.sh rate RATE|none        set its rate, in each direction
#   tools/two_hosts.sh status                show both; exit 1 if they are not there
#   tools/two_hosts.sh stop                  end the processes inside by SIGTERM, remove all
# It needs root and iproute2 (else exit 2). Files and CPUs are shared, the machine's network is not.
set -euo pipefail

names=(th-a th-b)
addresses=(198.18.97.1 198.18.97.2)   # of the range that is set aside for tests between hosts
link=th0                              # in both: each has its end
mark='made by two_hosts.sh'
export PATH=$PATH:/usr/sbin:/sbin     # where ip and tc are, also for those without it

say() { echo "two_hosts: $*"; }
die() { say "$@" >&2; exit 1; }

need_iproute_and_root() {
  local lack=''
  { type -P ip && type -P tc; } >/dev/null || lack='package missing: iproute2. '
  # A container's root may lack the right to make namespaces.
  ((EUID == 0)) && unshare --net --uts true 2>/dev/null || lack+='It needs root with CAP_SYS_ADMIN.'
  [[ -z $lack ]] || { say "${lack% }" >&2; exit 2; }
}

# What is ours bears a mark, so that nobody else's is touched: a namespace as its loopback's alias
# (a file beside it could outlive it), a folder of /etc/netns as the first line of its hosts.
is_ours() { [[ -e /run/netns/$1 && $(ip -n "$1" link show lo) == *"alias $mark"* ]]; }
files_are_ours() { grep -qsxF "# $mark" "/etc/netns/$1/hosts"; }
pids_inside() { for name in "${names[@]}"; do ! is_ours "$name" || ip netns pids "$name"; done; }

is_up() {   # the address of the second end comes last
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
    # The burst is small against a message of some MB.
    if [[ $1 != none ]]; then
      tc -n "$name" qdisc replace dev "$link" root tbf rate "$1" burst 128kb latency 50ms
    elif [[ $(tc -n "$name" qdisc show dev "$link") == *tbf* ]]; then
      tc -n "$name" qdisc del dev "$link" root
    fi
  done
}

set_link() { for name in "${names[@]}"; do ip -n "$name" link set "$link" "$1"; done; }

tear_down() {   # the link goes with its namespaces
  for name in "${names[@]}"; do
    ! is_ours "$name" || ip netns del "$name"
    ! files_are_ours "$name" || rm -r "/etc/netns/$name"
  done
  rmdir /etc/netns 2>/dev/null || true   # unless it holds others'
}

build() {
  for name in "${names[@]}"; do
    ip netns add "$name"
    ip -n "$name" link set lo up alias "$mark"
    # `ip netns exec` shows these in the place of the files in /etc. No name server is in reach:
    # the machine's resolv.conf would make a look-up of what hosts lacks take ten seconds and more.
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
  pids_inside | xargs -r kill -TERM 2>/dev/null || true   # some may just have ended
  SECONDS=0   # torchrun gives its ranks 30 s
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
  # The host's own name resolves to its address on the link: so torchrun knows which host is the
  # rendezvous's, and nobody takes 127.0.0.1 for an address that others reach.
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

#!/usr/bin/env bash
# Two hosts on this machine, for development and tests: network namespaces with addresses of their
# own, joined by a link (a veth pair) whose rate can be set and which can be cut.
#   tools/two_hosts.sh start [RATE]          make them; RATE as tc takes it (100mbit), else no limit
#   tools/two_hosts.sh exec 0|1 COMMAND...   run a command in one; it sees both addresses as HOST0
#                                            and HOST1, both names (th-a, th-b) resolve
#   tools/two_hosts.sh link up|down          cut the link, or restore it
#   tools/two_hosts.sh rate RATE|none        set its rate, in each direction
#   tools/two_hosts.sh status                show both; exit 1 if they are not there
#   tools/two_hosts.sh stop                  end the processes inside by SIGTERM, remove all
# It needs root and iproute2 (exit 2 without). Files, CPUs and the machine's name are shared; the
# machine's own network stays as it is, and there is no way to it from inside.
set -euo pipefail

names=(th-a th-b)
addresses=(198.18.97.1 198.18.97.2)   # of the range that is set aside for tests between hosts
link=th0                              # in both: each has its end
mark='made by two_hosts.sh'
export PATH=$PATH:/usr/sbin:/sbin     # where ip and tc are, also for those without it

say() { echo "two_hosts: $*"; }
die() { say "$@" >&2; exit 1; }
usage() {
  echo "usage: $0 start [RATE] | exec 0|1 COMMAND... | link up|down | rate RATE|none | status | stop" >&2
  exit 2
}

need_iproute_and_root() {
  local lack=''
  type -P ip tc >/dev/null && type -P tc >/dev/null || lack='iproute2 is missing (apt-get install iproute2). '
  if ((EUID != 0)); then
    lack+='It needs root.'
  elif ! unshare --net true 2>/dev/null; then   # root of a container
    lack+='It needs the right to make network namespaces (CAP_SYS_ADMIN).'
  fi
  [[ -z $lack ]] || { say "${lack% }" >&2; exit 2; }
}

# Ours bear a mark, so that nobody else's are touched: namespaces as their loopback's alias (a file
# beside them could outlive them), folders of /etc/netns as the first line of their hosts.
exists() { [[ -e /run/netns/$1 ]]; }
is_ours() { exists "$1" && [[ $(ip -n "$1" link show lo) == *"alias $mark"* ]]; }
hosts_are_ours() { grep -qsxF "# $mark" "/etc/netns/$1/hosts"; }

is_up() {   # setting the second end up was the last step
  is_ours th-a && is_ours th-b && [[ $(ip -n th-b addr show 2>/dev/null) == *"$link@"*inet* ]]
}
need_up() { is_up || die "not running; '$0 start' makes both hosts"; }

refuse_foreign() {
  for name in "${names[@]}"; do
    ! exists "$name" || is_ours "$name" || die "a namespace $name is there that is not ours: nothing done"
    [[ ! -e /etc/netns/$name ]] || hosts_are_ours "$name" ||
      die "/etc/netns/$name is there and not ours: nothing done"
  done
}

set_rate() {
  for name in "${names[@]}"; do
    if [[ $1 != none ]]; then
      # Packets that would wait longer than 50 ms are dropped, as a switch does; the burst is small
      # against a message of some MB and large enough for 10gbit.
      tc -n "$name" qdisc replace dev "$link" root tbf rate "$1" burst 128kb latency 50ms
    elif [[ $(tc -n "$name" qdisc show dev "$link") == *tbf* ]]; then
      tc -n "$name" qdisc del dev "$link" root
    fi
  done
}

build() {
  for name in "${names[@]}"; do
    ip netns add "$name"
    ip -n "$name" link set lo up alias "$mark"
    # `ip netns exec` shows a command this file in the place of /etc/hosts.
    mkdir -p "/etc/netns/$name"
    { echo "# $mark"; paste <(printf '%s\n' "${addresses[@]}") <(printf '%s\n' "${names[@]}"); cat /etc/hosts; } \
      >"/etc/netns/$name/hosts"
  done
  ip link add "$link" netns th-a type veth peer name "$link" netns th-b
  for host in 0 1; do
    ip -n "${names[host]}" addr add "${addresses[host]}/30" dev "$link"
    ip -n "${names[host]}" link set "$link" up
  done
}

tear_down() {   # the link goes with its namespaces
  for name in "${names[@]}"; do
    ! is_ours "$name" || ip netns del "$name"
    if hosts_are_ours "$name"; then rm -r "/etc/netns/$name"; fi
  done
  rmdir /etc/netns 2>/dev/null || true   # unless it holds others'
}

pids_inside() { for name in "${names[@]}"; do ! is_ours "$name" || ip netns pids "$name"; done; }

start() {
  refuse_foreign
  if is_up; then
    [[ -z ${1-} ]] || set_rate "$1"
    say "already running${1:+, rate set to $1}"
    return
  fi
  [[ -z $(pids_inside) ]] || die "only a part is there, and in use: '$0 stop' removes it"
  tear_down
  trap 'tear_down; say "not started, nothing is left" >&2' EXIT
  build
  set_rate "${1:-none}"
  trap - EXIT
  say "running; '$0 exec 0 COMMAND' and '$0 exec 1 COMMAND' run commands there"
}

stop() {
  refuse_foreign
  local was=''
  for name in "${names[@]}"; do if is_ours "$name" || hosts_are_ours "$name"; then was=1; fi; done
  [[ -n $was ]] || { say "not running"; return; }
  pids_inside | xargs -r kill -TERM 2>/dev/null || true   # some may just have ended
  SECONDS=0   # torchrun gives its ranks 30 s
  while [[ -n $(pids_inside) ]] && ((SECONDS < 40)); do sleep 0.2; done
  if [[ -n $(pids_inside) ]]; then
    pids_inside | xargs ps -o pid=,args= -p >&2 || true
    die "these processes inside did not end by SIGTERM: nothing removed"
  fi
  tear_down
  say "stopped"
}

status() {
  is_up || { say "not running"; exit 1; }
  for host in 0 1; do
    local name=${names[host]} cut='link down' rate=none
    [[ $(ip -n "$name" link show "$link") != *LOWER_UP* ]] || cut='link up'
    [[ ! $(tc -n "$name" qdisc show dev "$link") =~ rate\ ([^ ]+) ]] || rate=${BASH_REMATCH[1]}
    say "host $host: $name, ${addresses[host]}, $cut, rate $rate, $(ip netns pids "$name" | wc -l) processes"
  done
}

run() {
  local variables=("HOST0=${addresses[0]}" "HOST1=${addresses[1]}")
  variables+=("GLOO_SOCKET_IFNAME=$link" "NCCL_SOCKET_IFNAME=$link")
  exec ip netns exec "${names[$1]}" env "${variables[@]}" "${@:2}"
}

set_link() { for name in "${names[@]}"; do ip -n "$name" link set "$link" "$1"; done; }

case $#:${1-}:${2-} in
  [12]:start:* | 1:stop:) lock=1 ;;
  2:link:up | 2:link:down | 2:rate:?*) lock=1 ;;
  1:status: | [3-9]:exec:[01] | [1-9][0-9]*:exec:[01]) lock='' ;;
  *) usage ;;
esac
need_iproute_and_root
[[ -z $lock ]] || { exec 9<"${BASH_SOURCE[0]}" && flock 9; }   # one at a time
case $1 in
  start) start "${2-}" ;;
  stop | status) "$1" ;;
  exec) need_up; run "${@:2}" ;;
  link) need_up; set_link "$2" ;;
  rate) need_up; set_rate "$2" ;;
esac

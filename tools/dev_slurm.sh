#!/usr/bin/env bash
# A real SLURM with two nodes (n1, n2) on this machine, for development and tests:
#   tools/dev_slurm.sh start     start it (needs root and Debian's slurm-wlm and munge)
#   tools/dev_slurm.sh start two_hosts    with a node on each host of two_hosts.sh, which must run;
#                                commands such as sbatch need `two_hosts.sh exec 0 sbatch ...`
#   tools/dev_slurm.sh status    show its nodes; exit 1 if it is not running
#   tools/dev_slurm.sh env       print a line for eval, by which sbatch and the like find it
#   tools/dev_slurm.sh stop      cancel its jobs, end its daemons, remove its folder
# It writes only to $DEV_SLURM_DIR (default: ${TMPDIR:-/tmp}/dev-slurm-UID). Its munged uses a key
# and a socket in this folder, and its other daemons use ports that no other SLURM uses by default.
set -euo pipefail

dir=$(realpath -m -- "${DEV_SLURM_DIR:-${TMPDIR:-/tmp}/dev-slurm-$(id -u)}")
conf=$dir/slurm.conf
mark='# Written by dev_slurm.sh'
export PATH=$PATH:/usr/sbin   # the daemons may lie outside of PATH

say() { echo "dev_slurm: $*"; }
die() { say "$@" >&2; exit 1; }
ours() { grep -qsxF "$mark" "$conf"; }
on_two_hosts() { grep -qs '^SlurmctldHost=th-a' "$conf"; }
# Sets the words before a command that make it run on the host of n1 or n2; all daemons but the
# slurmd of n2 run on the host of n1.
place() {
  there=(env)
  on_two_hosts || return 0
  local host=0
  [[ $1 != n2 ]] || host=1
  there=("$(dirname -- "${BASH_SOURCE[0]}")/two_hosts.sh" exec "$host")
}
client() { place n1 && "${there[@]}" env SLURM_CONF="$conf" timeout 10 "$@"; }

# True if process $1 is a $2 with a file of our folder among its arguments, which all our daemons
# have. A pid file alone is no proof: another process may have its number.
is_ours() {
  local words=()
  mapfile -d '' words 2>/dev/null <"/proc/$1/cmdline" || return 1
  [[ ${words[0]-} == "$2" && ${words[*]} == *[\ =]"$dir/"* ]]
}

# Prints the pid of our daemon $1 (munged, slurmctld or the slurmds n1, n2), if it runs.
pid_of() {
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) && is_ours "$pid" "${1/#n[12]/slurmd}" && echo "$pid"
}

is_up() { for name in munged slurmctld n1 n2; do pid_of "$name" >/dev/null || return 1; done; }

# Refuses to work beside another SLURM on this machine or in the environment.
refuse_foreign() {
  [[ ${SLURM_CONF:-$conf} == "$conf" ]] || die "SLURM_CONF is $SLURM_CONF, not ours: nothing done"
  for proc in /proc/[0-9]*; do
    mapfile -d '' words 2>/dev/null <"$proc/cmdline" || continue   # the process has ended
    [[ ${words[0]-} =~ (^|/)slurm(ctl)?d$ && ${words[*]} != *[\ =]"$dir/"* ]] || continue
    die "${words[0]} (pid ${proc#/proc/}) runs and is not ours: nothing done"
  done
}

need_packages_and_root() {
  local lack=''
  type -P slurmctld slurmd sbatch >/dev/null || lack+=' slurm-wlm'
  type -P munged mungekey >/dev/null || lack+=' munge'
  lack=${lack:+packages missing:$lack (apt-get install slurm-wlm munge). }
  ((EUID == 0)) || lack+='It needs root.'
  [[ -z $lack ]] || { say "${lack% }" >&2; exit 2; }
}

make_folder() {
  [[ ! $dir =~ [[:space:],#%] ]] || die "$dir: no name for SLURM, set DEV_SLURM_DIR to another"
  mkdir -p -- "$dir"
  [[ -O $dir ]] || die "$dir belongs to somebody else"
  ours || [[ -z $(ls -A -- "$dir") ]] || die "$dir holds files that are not ours"
  chmod 755 "$dir"
  mkdir -p "$dir/state" "$dir/spool.n1" "$dir/spool.n2"
  [[ -s $dir/munge.key ]] || mungekey --create --keyfile="$dir/munge.key"
  local first='localhost NodeAddr=127.0.0.1' second='localhost NodeAddr=127.0.0.1'
  local master='localhost(127.0.0.1)'
  if [[ ${1-} == two_hosts ]]; then
    first='th-a NodeAddr=198.18.97.1' second='th-b NodeAddr=198.18.97.2' master='th-a(198.18.97.1)'
  fi
  # No plugin here uses cgroups; without this line slurmd looks for their mounted file system.
  echo "CgroupPlugin=cgroup/v1" >"$dir/cgroup.conf"
  # config_overrides: a node has the CPUs and the memory of this file, on a machine of any size
  # (no limit on memory is enforced). cred_expire: seconds that a requeued job waits (default 120).
  cat >"$conf" <<END
$mark
ClusterName=dev
SlurmctldHost=$master
SlurmctldPort=26817
SlurmUser=root
AuthInfo=socket=$dir/munge.socket,cred_expire=10
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/state/pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool.%n
SlurmdPidFile=$dir/spool.%n/pid
SlurmdLogFile=$dir/%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5,bf_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=10
MinJobAge=60
ReturnToService=2
NodeName=n1 NodeHostname=$first Port=26818 CPUs=2 RealMemory=64000
NodeName=n2 NodeHostname=$second Port=26819 CPUs=2 RealMemory=64000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=n[1-2] MaxTime=UNLIMITED PriorityTier=1 GraceTime=30
END
}

# Starts daemon $1 unless it runs. It runs in the foreground of a new session: its pid is known at
# once, it gets no signal that is sent to us, and it keeps no lock or pipe of ours open. The
# daemon's own pid file does not serve: the daemon removes it long before it ends.
launch() {
  local command=(slurmd -D -f "$conf" -N "$1")
  [[ $1 != slurmctld ]] || command=(slurmctld -D -f "$conf")
  [[ $1 != munged ]] || command=(munged --foreground --force --num-threads=2 --origin=127.0.0.1
    --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munge.pid"
    --seed-file="$dir/munge.seed")
  pid_of "$1" >/dev/null && return
  place "$1"
  [[ $1 == munged ]] || command=("${there[@]}" "${command[@]}")
  setsid "${command[@]}" </dev/null >"$dir/$1.out" 2>&1 9>&- &
  echo $! >"$dir/$1.pid"
  disown
}

# Starts the missing daemons, and waits until both nodes answer: idle, or busy with a job that has
# outlived its daemons.
bring_up() {
  for name in munged slurmctld n1 n2; do
    launch "$name"
    for _ in {1..50}; do munge -n --socket="$dir/munge.socket" &>/dev/null && break; sleep 0.1; done
  done
  SECONDS=0
  while ((SECONDS < 30)); do
    sleep 0.5
    if ! is_up; then
      ((SECONDS < 4)) || return 1
    elif (($(client sinfo -hN -p main -o %t 2>&1 | grep -cxE 'idle|mix|alloc|comp') == 2)); then
      return 0
    fi
  done
  return 1
}

# Cancels the jobs, waits for their end (KillWait and some seconds), and ends the daemons.
shut_down() {
  local pid
  if pid_of slurmctld >/dev/null; then
    client squeue -h -o %A 2>/dev/null | client xargs -r scancel || true
    for _ in {1..40}; do [[ -n $(client squeue -h 2>/dev/null) ]] || break; sleep 0.5; done
  fi
  for name in n1 n2 slurmctld munged; do
    for signal in {1..20}TERM {1..10}KILL; do
      pid=$(pid_of "$name") || break
      kill -"${signal##*[0-9]}" "$pid" 2>/dev/null || true
      sleep 0.5
    done
  done
  rm -rf -- "$dir"
}

start() {
  need_packages_and_root
  refuse_foreign
  if is_up; then
    [[ -n ${1-} ]] && on_two_hosts || { [[ -z ${1-} ]] && ! on_two_hosts; } ||
      die "it runs on other hosts: stop it first"
    say "already running"
    return
  fi
  make_folder "${1-}"
  if bring_up; then say "running; eval \"\$($0 env)\" points sbatch and the like at it"; return; fi
  tail -n 8 "$dir"/*.out >&2
  shut_down
  die "it did not come up, the last lines of its logs are above; all is ended and removed"
}

stop() {
  refuse_foreign
  if ! ours; then say "not running"; return; fi
  need_packages_and_root
  is_up || bring_up || true   # cancelling jobs, which outlive daemons, needs the daemons
  shut_down
  say "stopped"
}

case $#:${*} in
  1:start | "2:start two_hosts" | 1:stop)
    exec 9<"${BASH_SOURCE[0]}" && flock 9   # one at a time
    "$@" ;;
  1:status) if ! is_up || ! client sinfo; then say "not running"; exit 1; fi ;;
  1:env) if is_up; then echo "export SLURM_CONF=$conf"; else die "not running"; fi ;;
  *) echo "usage: $0 start [two_hosts]|stop|status|env" >&2; exit 2 ;;
esac

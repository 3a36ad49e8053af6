#!/bin/bash
# A real SLURM cluster of four nodes on this one machine, for tests; nothing outside DIR is touched.
#   launch/slurm/test-cluster.sh install       # Debian and Ubuntu: apt-get install slurm-wlm munge, as root
#   launch/slurm/test-cluster.sh start DIR     # starts it; then: export SLURM_CONF=DIR/slurm.conf
#   launch/slurm/test-cluster.sh stop DIR      # ends what start started, and nothing else
# Partitions: main, whose jobs are preempted with a warning and 30 s of grace, and high, which preempts. The four nodes
# n1 to n4 say that they have eight cores and two GPUs each, so that jobs fit on a small machine. All of it listens on
# loopback alone.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin
NAME=recalign-test

install() {
  if command -v slurmctld >/dev/null && command -v munged >/dev/null; then return; fi
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge
}

configure() {
  local dir=$1 port=$((40000 + RANDOM % 15000)) user
  user=$(id -un)
  mkdir -p "$dir"/{state,log,spool/n1,spool/n2,spool/n3,spool/n4}
  chmod 700 "$dir"
  (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
  # Any two devices: they are counted and handed out, and that is all.
  printf 'NodeName=n[1-4] Name=gpu File=%s\n' /dev/null /dev/zero >"$dir/gres.conf"
  cat >"$dir/slurm.conf" <<EOF
ClusterName=$NAME
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
GresTypes=gpu
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
# A requeued job comes back after the credentials of its last attempt have expired; by default that takes minutes.
AuthInfo=socket=$dir/munge.socket,cred_expire=5
MpiDefault=none
# No control groups: containers seldom may make any.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdSpoolDir=$dir/spool/%n
StateSaveLocation=$dir/state
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=500000,batch_sched_delay=1,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=5
MinJobAge=600
NodeName=n[1-4] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 4))] CPUs=8 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=n[1-4] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n[1-4] MaxTime=INFINITE State=UP PriorityTier=10
EOF
}

start() {
  local dir=$1
  ! is_ours "$dir" || { echo "$dir holds a cluster; stop it first" >&2; exit 2; }
  [ -z "$(ls -A "$dir" 2>/dev/null)" ] || { echo "$dir is not empty: a cluster wants a folder of its own" >&2; exit 2; }
  configure "$dir"
  export SLURM_CONF=$dir/slurm.conf
  munged --force --socket="$dir/munge.socket" --key-file="$dir/munge.key" --pid-file="$dir/munged.pid" \
    --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/log/munged.err"
  slurmctld -f "$SLURM_CONF"
  for node in n1 n2 n3 n4; do slurmd -f "$SLURM_CONF" -N "$node"; done
  for _ in $(seq 60); do
    [ "$(sinfo --noheader --partition=main --states=idle --format=%D 2>/dev/null)" = 4 ] && return
    sleep 0.5
  done
  echo "the nodes did not come up; see $dir/log" >&2
  exit 1
}

# is_ours DIR: nothing else is ever deleted.
is_ours() { grep -qsx "ClusterName=$NAME" "$1/slurm.conf"; }

stop() {
  local dir=$1 pid file name
  [ -e "$dir" ] || return 0
  is_ours "$dir" || { echo "$dir holds no cluster of this script: not deleting it" >&2; exit 2; }
  SLURM_CONF=$dir/slurm.conf timeout 20 scancel --user="$(id -un)" 2>/dev/null || true
  sleep 1
  for file in "$dir"/slurmd-n*.pid "$dir/slurmctld.pid" "$dir/munged.pid"; do
    [ -e "$file" ] || continue
    pid=$(cat "$file") name=$(basename "${file%.pid}")
    # A process that has died may have left its number to another one.
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "${name%-n?}" ] || continue
    kill "$pid" 2>/dev/null || continue
    for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL "$pid" 2>/dev/null || true
  done
  rm -rf "$dir"
}

case "${1:-}" in
  install) install ;;
  start | stop) "$1" "$(realpath --canonicalize-missing "${2:?which folder?}")" ;;
  *) sed -n '2,5s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

#!/usr/bin/env bash
# A real SLURM on one machine: virtual nodes, no systemd, Debian's packages; needs root. For tests and for trying things.
#   tests/slurm/cluster.sh install | up | down | env | node-up NODE | node-kill NODE
#   eval "$(tests/slurm/cluster.sh env)"      points sbatch, squeue and submitit at it
# NODES=2 CPUS=4 SLURM_TEST_DIR=/tmp/ambient-slurm
set -euo pipefail
base=${SLURM_TEST_DIR:-/tmp/ambient-slurm}
nodes=${NODES:-2}
cpus=${CPUS:-4}
host=$(hostname -s)
export SLURM_CONF=$base/etc/slurm.conf

alive() { local its; its=$(cat "$1" 2>/dev/null) && [ -d "/proc/$its" ] && [ -n "$its" ] && ! grep -qs "^State:.Z" "/proc/$its/status"; }

# Ends the process that a pid file names, and no other.
end() {
  alive "$1" || { rm -f "$1"; return 0; }
  local pid
  pid=$(cat "$1")
  kill "$pid"
  for _ in $(seq 1000); do
    alive "$1" || { rm -f "$1"; return 0; }
    sleep 0.1
  done
  kill -9 "$pid" || true
  rm -f "$1"
}

install_packages() {
  local program missing=
  for program in slurmctld slurmd sbatch munged; do command -v "$program" >/dev/null || missing=$program; done
  [ -n "$missing" ] || return 0
  if ! command -v apt-get >/dev/null || [ "$(id -u)" != 0 ]; then
    echo "SLURM is not here, and only root on Debian can install it: apt-get install slurmctld slurmd slurm-client munge" >&2
    return 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
}

configure() {
  install -d -m 755 "$base" "$base"/{etc,log,pid,spool,state}
  echo "CgroupAutomount=no" > "$base/etc/cgroup.conf"
  {
    # FirstJobId: ids never repeat, since submitit takes the files of an older job of the same id for the new one's.
    # cred_expire: a requeued job may start so many seconds later (120 by default).
    # MinJobAge: squeue knows ended jobs for an hour, as there is no accounting.
    cat <<CONF
ClusterName=test
FirstJobId=$(($(date +%s) % 60000000))
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=20
CredType=cred/munge
SlurmctldPort=16817
StateSaveLocation=$base/state
SlurmdSpoolDir=$base/spool/%n
SlurmctldPidFile=$base/pid/slurmctld
SlurmdPidFile=$base/pid/slurmd.%n
SlurmctldLogFile=$base/log/slurmctld.log
SlurmdLogFile=$base/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=1
JobRequeue=1
KillWait=60
SlurmdTimeout=30
SlurmctldTimeout=15
BatchStartTimeout=60
MinJobAge=3600
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
PropagateResourceLimits=NONE
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
CONF
    for i in $(seq "$nodes"); do
      echo "NodeName=node$i NodeHostname=$host NodeAddr=127.0.0.1 Port=$((17000 + i)) CPUs=$cpus RealMemory=8000 State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120"
    echo "PartitionName=urgent Nodes=node[1-$nodes] MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF"
  } > "$SLURM_CONF"
  for i in $(seq "$nodes"); do # the ranks meet at the first node's name
    grep -qE "^127\.0\.0\.1[[:space:]]+node$i\$" /etc/hosts || echo "127.0.0.1 node$i" >> /etc/hosts
  done
}

start_munge() {
  munge -n >/dev/null 2>&1 && return 0
  [ -s /etc/munge/munge.key ] || { (umask 077 && head -c 1024 /dev/urandom > /etc/munge/munge.key) && chown munge: /etc/munge/munge.key; }
  install -d -o munge -g munge -m 755 /run/munge
  runuser -u munge -- /usr/sbin/munged
  echo /run/munge/munged.pid > "$base/started-munge"
  for _ in $(seq 1000); do
    munge -n 2>/dev/null | unmunge >/dev/null 2>&1 && return 0
    sleep 0.1
  done
  echo "munged did not start" >&2
  return 1
}

up() {
  install_packages
  if [ -s "$SLURM_CONF" ] && alive "$base/pid/slurmctld"; then :; else configure; fi
  start_munge
  alive "$base/pid/slurmctld" || slurmctld
  for i in $(seq "$nodes"); do alive "$base/pid/slurmd.node$i" || slurmd -N "node$i"; done
  for _ in $(seq 3000); do
    if [ "$(sinfo -h -N -p main -o %T 2>/dev/null | grep -cx idle)" = "$nodes" ]; then return 0; fi
    sleep 0.1
  done
  sinfo -N -l >&2 || true
  tail -n 20 "$base"/log/*.log >&2
  return 1
}

down() {
  [ -d "$base" ] || return 0
  scancel --user=root >/dev/null 2>&1 || true
  for _ in $(seq 1000); do
    [ -z "$(squeue -h -t PENDING,RUNNING,COMPLETING 2>/dev/null)" ] && break
    sleep 0.1
  done
  for file in "$base"/pid/slurmd.* "$base/pid/slurmctld"; do end "$file"; done
  if [ -s "$base/started-munge" ]; then end "$(cat "$base/started-munge")"; fi
  rm -rf "$base"
}

case ${1:-} in
  install) install_packages ;;
  up) up ;;
  down) down ;;
  env) echo "export SLURM_CONF=$SLURM_CONF AMBIENT_TEST_SLURM=$base" ;;
  node-up) slurmd -N "$2" >/dev/null 2>&1 ;;
  node-kill) kill -9 "$(cat "$base/pid/slurmd.$2")" ;;
  *) sed -n '2,5s/^# //p' "$0" >&2; exit 2 ;;
esac

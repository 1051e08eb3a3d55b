#!/usr/bin/env bash
# cluster.sh - a real Slurm cluster of several nodes on one Debian host,
# for tests that submit real jobs. Works without systemd, cgroups or a
# container engine. Everything listens on the loopback address only.
#
#   cluster.sh up       install what is missing, start, wait for idle nodes
#   cluster.sh down     cancel jobs, stop every daemon, remove all state
#   cluster.sh status   report; exit 0 healthy, 1 degraded, 3 down
#   cluster.sh env      print "export SLURM_CONF=..." for eval
#   cluster.sh logs     print the tail of every log (kept after "down")
#
# Settings (environment; read by "up"):
#   SLURM_LOCAL_DIR            state folder              (/var/lib/slurm-local)
#   SLURM_LOCAL_NODES          number of nodes           (2)
#   SLURM_LOCAL_CPUS           CPUs advertised per node  (8; may exceed reality)
#   SLURM_LOCAL_MEM_MB         MB advertised per node    (RAM, at least 16000)
#   SLURM_LOCAL_GPUS           pretend GPUs per node     (4; 0 for none)
#   SLURM_LOCAL_ACCOUNTING     dbd | none                (dbd: sacct works)
#   SLURM_LOCAL_REQUEUE_DELAY  seconds a requeued job stays pending  (5)
#   SLURM_LOCAL_KILL_WAIT      seconds between SIGTERM and SIGKILL   (10)
#   SLURM_LOCAL_PORT           first of the ports used   (11810)
#   SLURM_LOCAL_TIMEOUT        bound on "up", after installation     (60)
#   SLURM_LOCAL_INSTALL        1: apt-get install missing packages   (1)
#   SLURM_LOCAL_TASK_PLUGIN    none | affinity           (none)
set -Eeuo pipefail
export LC_ALL=C
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

ME=slurm-local
DIR=${SLURM_LOCAL_DIR:-/var/lib/slurm-local}
NODES=${SLURM_LOCAL_NODES:-2}
CPUS=${SLURM_LOCAL_CPUS:-8}
GPUS=${SLURM_LOCAL_GPUS:-4}
ACCT=${SLURM_LOCAL_ACCOUNTING:-dbd}
DELAY=${SLURM_LOCAL_REQUEUE_DELAY:-5}
KILLWAIT=${SLURM_LOCAL_KILL_WAIT:-10}
PORT=${SLURM_LOCAL_PORT:-11810}
BOUND=${SLURM_LOCAL_TIMEOUT:-60}
INSTALL=${SLURM_LOCAL_INSTALL:-1}
TASKPLUGIN=${SLURM_LOCAL_TASK_PLUGIN:-none}
PREFIX=slocal                      # nodes are slocal1, slocal2, ...
CONF=$DIR/etc/slurm.conf
SYSCONF=/etc/slurm/slurm.conf
TAG="# added by $ME for $DIR"
DEADLINE=0

# a call from inside a job, or from a shell set up for another cluster, must not leak in
for v in "${!SLURM_@}" "${!SRUN_@}" "${!SBATCH_@}" "${!SALLOC_@}" "${!SQUEUE_@}" "${!SINFO_@}" "${!SACCT_@}"; do
  [[ $v == SLURM_LOCAL_* && $v != SLURM_LOCAL_JOB ]] || unset "$v"
done
unset v
# daemons walk over every possible descriptor; some containers allow 2^30 of them
if [[ $(ulimit -n) == unlimited || $(ulimit -n) -gt 65536 ]]; then ulimit -n 65536; fi

say()  { printf '%s: %s\n' "$ME" "$*"; }
warn() { printf '%s: warning: %s\n' "$ME" "$*" >&2; }
die()  { printf '%s: error: %s\n' "$ME" "$*" >&2; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

check_settings() {
  local v
  for v in NODES CPUS GPUS DELAY KILLWAIT PORT BOUND; do
    [[ ${!v} =~ ^[0-9]+$ ]] || die "SLURM_LOCAL setting for $v is not a number: '${!v}'"
  done
  (( NODES >= 1 && NODES <= 16 )) || die "SLURM_LOCAL_NODES must be 1..16"
  (( CPUS >= 1 )) || die "SLURM_LOCAL_CPUS must be at least 1"
  [[ $ACCT == dbd || $ACCT == none ]] || die "SLURM_LOCAL_ACCOUNTING must be dbd or none"
  [[ $TASKPLUGIN == none || $TASKPLUGIN == affinity ]] \
    || die "SLURM_LOCAL_TASK_PLUGIN must be none or affinity"
  case $DIR in
    /tmp|/var|/etc|/usr|/home|/root|/) die "SLURM_LOCAL_DIR=$DIR is not a folder of its own" ;;
    /*) ;;
    *) die "SLURM_LOCAL_DIR must be an absolute path" ;;
  esac
  [[ $DIR =~ ^[A-Za-z0-9_./-]+$ ]] || die "SLURM_LOCAL_DIR has characters Slurm's files cannot hold"
  # munge and slurmstepd use unix sockets under DIR (108 bytes at most)
  (( ${#DIR} <= 60 )) || die "SLURM_LOCAL_DIR is too long for unix sockets (60 characters at most)"
}

short_hostname() { local h; h=$(uname -n); echo "${h%%.*}"; }
node_names() { local i; for ((i = 1; i <= NODES; i++)); do echo "$PREFIX$i"; done; }

# ---------------------------------------------------------------- processes
# alive PID: running and not a zombie
alive() {
  local state
  state=$(sed -n 's/^State:[[:space:]]*\(.\).*/\1/p' "/proc/$1/status" 2>/dev/null) || return 1
  [[ -n $state && $state != Z && $state != X ]]
}

# pid_of FILE NAME: the pid in FILE, if it is alive and its command name starts with NAME
pid_of() {
  local pid comm
  [[ -s $1 ]] || return 1
  read -r pid < "$1" || true
  [[ $pid =~ ^[0-9]+$ && -r /proc/$pid/comm ]] || return 1
  read -r comm < "/proc/$pid/comm" || return 1
  [[ $comm == "$2"* ]] || return 1
  alive "$pid" || return 1
  echo "$pid"
}

# daemons in start order: "name pidfile comm"
daemons() {
  echo "munged $DIR/run/munged.pid munged"
  if [[ $(acct_mode) == dbd ]]; then
    echo "mariadbd $DIR/run/mariadbd.pid mariadbd"
    echo "slurmdbd $DIR/run/slurmdbd.pid slurmdbd"
  fi
  echo "slurmctld $DIR/run/slurmctld.pid slurmctld"
  local n
  for n in $(conf_nodes); do echo "slurmd@$n $DIR/run/slurmd.$n.pid slurmd"; done
}

# what the existing configuration says (it may differ from this call's settings)
conf_nodes() {
  if [[ -r $CONF ]]; then sed -n 's/^NodeName=\([^ ]*\) .*/\1/p' "$CONF"; else node_names; fi
}
acct_mode() {
  if [[ -r $CONF ]]; then
    if grep -q '^AccountingStorageType=accounting_storage/slurmdbd' "$CONF"; then echo dbd; else echo none; fi
  else echo "$ACCT"; fi
}

# stop_pid PID SECONDS: TERM, wait, then KILL
stop_pid() {
  local pid=$1 tries=$(( $2 * 10 ))
  kill -TERM "$pid" 2>/dev/null || return 0
  while alive "$pid"; do
    if (( tries-- <= 0 )); then kill -KILL "$pid" 2>/dev/null || true; sleep 0.2; return 0; fi
    sleep 0.1
  done
}

# processes of this cluster that no pid file names: daemons left by a broken start
# (they name DIR on their command line or in SLURM_CONF), step daemons, and the jobs'
# own processes (marked by the task prolog). Never this script or its ancestors.
stray_pids() {
  local self=" " p=$$ f comm
  while [[ $p =~ ^[0-9]+$ ]] && (( p > 1 )); do
    self+="$p "
    p=$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$p/status" 2>/dev/null || echo 1)
  done
  {
    grep -lsz -F -e "SLURM_CONF=$DIR/" /proc/[0-9]*/environ || true
    grep -lsz -F -e "=$DIR/" /proc/[0-9]*/cmdline || true
    grep -lszx -F -e "SLURM_LOCAL_JOB=$DIR" /proc/[0-9]*/environ | sed 's/$/ job/' || true
  } | while read -r f job; do
    p=${f#/proc/}; p=${p%%/*}
    [[ $self == *" $p "* ]] && continue
    if [[ $job != job ]]; then
      read -r comm 2>/dev/null < "/proc/$p/comm" || continue
      case $comm in munged|mariadbd|slurmdbd|slurmctld|slurmd|slurmstepd|slurmscriptd) ;; *) continue ;; esac
    fi
    echo "$p"
  done | sort -un
}

# ------------------------------------------------------------- installation
install_packages() {
  local -a want=()
  have munged    || want+=(munge)
  have slurmctld || want+=(slurmctld)
  have slurmd    || want+=(slurmd)
  have srun      || want+=(slurm-client)
  if [[ $ACCT == dbd ]]; then
    have slurmdbd || want+=(slurmdbd)
    have mariadbd || want+=(mariadb-server-core)
    have mariadb  || want+=(mariadb-client-core)
  fi
  (( ${#want[@]} )) || return 0
  [[ $INSTALL == 1 ]] || die "missing packages: ${want[*]} (and SLURM_LOCAL_INSTALL is not 1)"
  have apt-get || die "missing: ${want[*]}; this host has no apt-get to install them with"
  say "installing: ${want[*]}"
  local log; log=$(mktemp "/tmp/$ME-apt.XXXXXX") policy=/usr/sbin/policy-rc.d made=0 rc=0
  # keep the packages from starting their own services
  if [[ ! -e $policy ]]; then printf '#!/bin/sh\nexit 101\n' > "$policy"; chmod 755 "$policy"; made=1; fi
  {
    apt-get -o DPkg::Lock::Timeout=120 update &&
      DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=120 \
        install -y --no-install-recommends "${want[@]}"
  } > "$log" 2>&1 < /dev/null || rc=$?
  if (( made )); then rm -f "$policy"; fi
  if (( rc )); then tail -n 25 "$log" >&2; die "apt-get failed (exit $rc); its output is in $log"; fi
  rm -f "$log"
}

# ------------------------------------------------------------ configuration
write_hosts() {  # node names must resolve: rank 0's node is the rendezvous address
  local line host
  line="127.0.0.1 $(conf_nodes | tr '\n' ' ')"
  remove_hosts
  for host in "$(uname -n)" "$(short_hostname)"; do  # Slurm looks up the host's own name too
    if ! getent hosts "$host" >/dev/null 2>&1 && [[ " $line" != *" $host "* ]]; then line+="$host "; fi
  done
  if [[ -s /etc/hosts && -n $(tail -c 1 /etc/hosts) ]]; then echo >> /etc/hosts; fi
  printf '%s\n' "$line$TAG" >> /etc/hosts || die "cannot write /etc/hosts (node names must resolve)"
}
remove_hosts() {  # in place: /etc/hosts is a bind mount in containers
  local rest
  grep -q -F "$TAG" /etc/hosts 2>/dev/null || return 0
  rest=$(awk -v tag="$TAG" 'substr($0, length($0) - length(tag) + 1) != tag' /etc/hosts)
  printf '%s\n' "$rest" > /etc/hosts
}

link_sysconf() {
  mkdir -p "$(dirname "$SYSCONF")"
  if [[ -L $SYSCONF && $(readlink "$SYSCONF") == "$CONF" ]]; then return 0; fi
  if [[ -e $SYSCONF ]]; then
    warn "$SYSCONF belongs to another cluster and is left alone; use: eval \"\$($0 env)\""
    return 0
  fi
  ln -sfn "$CONF" "$SYSCONF"
}
unlink_sysconf() {
  if [[ -L $SYSCONF && $(readlink "$SYSCONF") == "$CONF" ]]; then rm -f "$SYSCONF"; fi
}

write_config() {
  local host mem first i n gres="" nodelist
  host=$(short_hostname)
  mem=${SLURM_LOCAL_MEM_MB:-}
  if [[ -z $mem ]]; then
    mem=$(awk '/^MemTotal:/{print int($2/1024)}' /proc/meminfo)
    (( mem >= 16000 )) || mem=16000
  fi
  # Ids grow from one "up" to the next, as on a cluster that is never wiped: tools
  # that keep results in folders named by job id must not meet an old one.
  first=$(( $(date +%s) % 60000000 + 1000 ))
  nodelist=$(node_names | paste -sd,)

  umask 022
  mkdir -p "$DIR"/{etc,log,run,munge,spool/ctld,gpu}
  chmod 755 "$DIR" "$DIR"/{etc,log,run,spool,gpu}
  chmod 700 "$DIR/munge"
  mkdir -p "$DIR/db"; chmod 700 "$DIR/db"
  for n in $(node_names); do mkdir -p "$DIR/spool/$n"; done
  # pretend GPUs: harmless device nodes; Slurm numbers them and sets
  # CUDA_VISIBLE_DEVICES. Without the right to make device nodes: no GPUs.
  for ((i = 0; i < GPUS; i++)); do
    if ! mknod -m 666 "$DIR/gpu/gpu$i" c 1 3 2>/dev/null; then
      warn "cannot make device nodes here: the nodes will offer no GPUs"
      GPUS=0
    fi
  done
  if (( GPUS > 0 )); then
    echo "Name=gpu File=$DIR/gpu/gpu$( (( GPUS == 1 )) && echo 0 || echo "[0-$((GPUS - 1))]" )" \
      > "$DIR/etc/gres.conf"
  fi

  ( umask 077; head -c 1024 /dev/urandom > "$DIR/munge/munge.key" )

  {
    cat <<CONF_END
# written by $ME; rewritten by every start
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again
AuthInfo=socket=$DIR/run/munge.socket,cred_expire=$DELAY
StateSaveLocation=$DIR/spool/ctld
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd.%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
FirstJobId=$first
MinJobAge=3600
# no cgroups
ProctrackType=proctrack/linuxproc
TaskPlugin=task/$TASKPLUGIN
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=30
PropagateResourceLimits=NONE
MpiDefault=none
SwitchType=switch/none
# the nodes may advertise more than this host has
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# without a default, a job that asks for no memory gets all of the node's
DefMemPerCPU=500
ReturnToService=2
JobRequeue=1
KillWait=$KILLWAIT
SlurmctldTimeout=60
SlurmdTimeout=60
SchedulerType=sched/builtin
# "defer": never start a job inside the submit call, so that a submitter has time
# to create the job's log folder, as it always has on a busy cluster
SchedulerParameters=defer,sched_interval=1,batch_sched_delay=0,sched_min_interval=200000
TaskProlog=$DIR/etc/task_prolog.sh
CONF_END
    if [[ $ACCT == dbd ]]; then
      cat <<CONF_END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((PORT + 1))
# for slurmdbd connections the munge socket is named here, not by AuthInfo
AccountingStoragePass=$DIR/run/munge.socket
AccountingStoreFlags=job_comment
CONF_END
    else
      echo "AccountingStorageType=accounting_storage/none"
    fi
    if (( GPUS > 0 )); then
      echo "GresTypes=gpu"
      gres=" Gres=gpu:$GPUS"
    fi
    i=0
    for n in $(node_names); do
      i=$((i + 1))
      echo "NodeName=$n NodeHostname=$host NodeAddr=127.0.0.1 Port=$((PORT + 1 + i))" \
        "CPUs=$CPUS RealMemory=$mem$gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=$nodelist Default=YES MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO State=UP"
  } > "$CONF"

  # marks every task of this cluster, so that "down" finds the ones left behind
  printf '#!/bin/sh\necho "export SLURM_LOCAL_JOB=%s"\n' "$DIR" > "$DIR/etc/task_prolog.sh"
  chmod 755 "$DIR/etc/task_prolog.sh"

  if [[ $ACCT == dbd ]]; then
    ( umask 077; cat > "$DIR/etc/slurmdbd.conf" <<CONF_END
# written by $ME
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((PORT + 1))
CommunicationParameters=NoInAddrAny
SlurmUser=root
DebugLevel=info
LogFile=$DIR/log/slurmdbd.log
PidFile=$DIR/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct
CommitDelay=1
CONF_END
    )
  fi
}

# ------------------------------------------------------------------- start
left() { echo $(( DEADLINE - SECONDS )); }

show_log() { if [[ -s $1 ]]; then echo "--- last lines of $1" >&2; tail -n 15 "$1" >&2; fi; }

# wait_for "what" LOGFILE command...: until the command succeeds or the bound is reached
wait_for() {
  local what=$1 log=$2; shift 2
  until "$@" >/dev/null 2>&1; do
    if (( $(left) <= 0 )); then
      show_log "$log"
      die "$what was not ready within ${BOUND}s; see $log, then run '$0 down'"
    fi
    sleep 0.2
  done
}

# launch NAME LOG command...: run a command that must daemonize (9 is the lock)
launch() {
  local name=$1 log=$2; shift 2
  if ! timeout 20 "$@" >> "$DIR/log/start.log" 2>&1 < /dev/null 9>&-; then
    show_log "$DIR/log/start.log"; show_log "$log"
    die "$name did not start (command: $*)"
  fi
}

sql()        { mariadb --no-defaults -u root -S "$DIR/db/sock" --connect-timeout=2 -e "$1"; }
munge_ok()   { munge -S "$DIR/run/munge.socket" -n | unmunge -S "$DIR/run/munge.socket"; }
dbd_ok()     { timeout 5 sacctmgr -n list cluster; }
ctld_ok()    { timeout 5 scontrol ping | grep -q 'is UP'; }
registered() { dbd_ok | grep -qw local; }

nodes_ready() {  # every node idle or working, none down, drained or silent ("*")
  local out want
  want=$(conf_nodes | wc -l)
  out=$(timeout 5 sinfo -h -N -o '%N %T') || return 1
  [[ $(grep -c -E ' (idle|mixed|allocated|completing)$' <<< "$out") == "$want" ]]
}

healthy() {
  local name file comm
  [[ -r $CONF ]] || return 1
  export SLURM_CONF=$CONF
  while read -r name file comm; do pid_of "$file" "$comm" >/dev/null || return 1; done < <(daemons)
  ctld_ok && nodes_ready || return 1
  if [[ $(acct_mode) == dbd ]]; then dbd_ok >/dev/null 2>&1 || return 1; fi
}

port_busy() { (exec 3<> "/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

cmd_up() {
  install_packages
  DEADLINE=$(( SECONDS + BOUND ))
  if healthy; then
    say "already up (settings of this call are not applied; use down first to change them)"
    write_hosts; link_sysconf
    cmd_status; return 0
  fi
  if [[ -e $DIR/etc || -e $DIR/run ]]; then say "cleaning up an earlier or half-started cluster"; fi
  teardown
  local p n
  for ((p = PORT; p <= PORT + 1 + NODES; p++)); do
    if port_busy "$p"; then die "port $p on 127.0.0.1 is taken; choose another SLURM_LOCAL_PORT"; fi
  done
  rm -rf "$DIR/log"
  write_config
  write_hosts
  link_sysconf
  export SLURM_CONF=$CONF
  cd /

  launch munged "$DIR/log/munged.log" munged --key-file="$DIR/munge/munge.key" \
    --socket="$DIR/run/munge.socket" --pid-file="$DIR/run/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/munge/munged.seed"
  wait_for munged "$DIR/log/munged.log" munge_ok

  if [[ $ACCT == dbd ]]; then
    launch mariadb-install-db "$DIR/log/mariadb-install.log" mariadb-install-db --no-defaults \
      --user=root --datadir="$DIR/db/data" --auth-root-authentication-method=normal --skip-test-db
    # no network port; the socket is in a folder that only root can enter
    setsid mariadbd --no-defaults --user=root --datadir="$DIR/db/data" --socket="$DIR/db/sock" \
      --skip-networking --pid-file="$DIR/run/mariadbd.pid" --log-error="$DIR/log/mariadbd.log" \
      --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 \
      --innodb-flush-log-at-trx-commit=0 --performance-schema=OFF \
      >> "$DIR/log/start.log" 2>&1 < /dev/null 9>&- &
    disown
    wait_for mariadbd "$DIR/log/mariadbd.log" sql "CREATE DATABASE IF NOT EXISTS slurm_acct"
    MYSQL_UNIX_PORT="$DIR/db/sock" launch slurmdbd "$DIR/log/slurmdbd.log" slurmdbd
    wait_for slurmdbd "$DIR/log/slurmdbd.log" dbd_ok
    timeout 20 sacctmgr -i add cluster local >> "$DIR/log/start.log" 2>&1 < /dev/null || true
    wait_for "the cluster's accounting record" "$DIR/log/slurmdbd.log" registered
  fi

  launch slurmctld "$DIR/log/slurmctld.log" slurmctld -c
  wait_for slurmctld "$DIR/log/slurmctld.log" ctld_ok
  for n in $(node_names); do launch "slurmd@$n" "$DIR/log/slurmd.$n.log" slurmd -N "$n"; done
  wait_for "the nodes (idle)" "$DIR/log/slurmctld.log" nodes_ready
  # one real step on every node: registration alone does not prove that jobs run
  local out
  out=$(timeout "$(( $(left) > 10 ? $(left) : 10 ))" srun -Q -N "$NODES" --ntasks-per-node=1 -J "$ME-probe" \
        sh -c 'echo probe-ok' 2>&1 < /dev/null) || true
  if [[ $(grep -c '^probe-ok$' <<< "$out") != "$NODES" ]]; then
    printf '%s\n' "$out" >&2
    for n in $(node_names); do show_log "$DIR/log/slurmd.$n.log"; done
    die "the daemons run, but a probe job did not; see $DIR/log"
  fi
  say "up: $NODES nodes"
  cmd_status
}

# -------------------------------------------------------------------- stop
teardown() {
  local name file comm pid ids tries
  if [[ -r $CONF ]]; then
    export SLURM_CONF=$CONF
    if ctld_ok 2>/dev/null; then
      ids=$(timeout 5 squeue -h -o %A 2>/dev/null | sort -u | tr '\n' ' ' || true)
      if [[ -n ${ids// /} ]]; then
        say "cancelling jobs: $ids"
        # shellcheck disable=SC2086
        timeout 10 scancel --quiet $ids >/dev/null 2>&1 || true
        sleep 0.5
        # shellcheck disable=SC2086
        timeout 10 scancel --quiet --signal=KILL --full $ids >/dev/null 2>&1 || true
        for ((tries = 0; tries < 50; tries++)); do
          [[ -n $(timeout 5 squeue -h -o %A 2>/dev/null || true) ]] || break
          sleep 0.2
        done
      fi
    fi
  fi
  for file in "$DIR"/run/slurmd.*.pid; do  # these are slow to stop: ask all at once
    if pid=$(pid_of "$file" slurmd); then kill -TERM "$pid" 2>/dev/null || true; fi
  done
  # reverse of the start order
  while read -r name file comm; do
    if pid=$(pid_of "$file" "$comm"); then stop_pid "$pid" 8; fi
  done < <(daemons | tac)
  while read -r pid; do
    [[ -n $pid ]] && stop_pid "$pid" 2
  done < <(stray_pids)
  unlink_sysconf
  remove_hosts
  rm -rf "${DIR:?}"/{etc,run,munge,spool,gpu,db}
}

cmd_down() {
  if [[ ! -d $DIR/etc && ! -d $DIR/run && -z $(stray_pids) ]]; then
    unlink_sysconf; remove_hosts; say "already down"; return 0
  fi
  teardown
  say "down (logs kept in $DIR/log)"
}

cmd_status() {
  local name file comm pid bad=0 any=0
  if [[ ! -r $CONF ]]; then say "down"; return 3; fi
  export SLURM_CONF=$CONF
  while read -r name file comm; do
    if pid=$(pid_of "$file" "$comm"); then any=1; printf '  %-16s pid %s\n' "$name" "$pid"
    else bad=1; printf '  %-16s not running\n' "$name"; fi
  done < <(daemons)
  if (( ! any )); then say "down (state left in $DIR; '$0 up' cleans it)"; return 3; fi
  timeout 5 sinfo -N -o '  %8N %10T cpus=%C mem=%m gres=%G' 2>&1 | tail -n +2 || true
  timeout 5 squeue -o '  %.12i %.10T %.20j %R' 2>&1 || true
  if (( bad )) || ! healthy; then say "degraded; '$0 up' restarts it, '$0 logs' shows why"; return 1; fi
  say "healthy; config $CONF"
}

cmd_env() {
  [[ -r $CONF ]] || die "not up"
  echo "export SLURM_CONF=$CONF"
}

cmd_logs() {
  local f
  [[ -d $DIR/log ]] || die "no logs in $DIR/log"
  for f in "$DIR"/log/*; do echo "=== $f"; tail -n "${1:-30}" "$f"; done
}

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"; }

lock() {  # one up/down at a time
  [[ $EUID == 0 ]] || die "needs root (munged, slurmctld and slurmd run as root here)"
  check_settings
  mkdir -p "$(dirname "$DIR")"
  exec 9> "$DIR.lock" || die "cannot write $DIR.lock"
  flock -w 120 9 || die "another $ME run holds $DIR.lock"
}

case ${1:-} in
  up)     lock; cmd_up ;;
  down)   lock; cmd_down ;;
  status) cmd_status ;;
  env)    cmd_env ;;
  logs)   shift; cmd_logs "$@" ;;
  -h|--help|help) usage ;;
  *)      usage >&2; exit 2 ;;
esac

# What the batch scripts share. Sourced after site.sh; needs bash 4.4.
#
# No signal is meant to reach Python: the launcher would die of it before its ranks could save. On a warning (USR1: the
# time is nearly up, or a job of higher priority wants the nodes) the batch shell writes RUN/STOP, the ranks see that
# within a step, save and end, and the job is requeued. What does not end in time is killed, which costs no more than
# the steps since the last checkpoint. A person may touch RUN/STOP too: then the job ends, and is not requeued. The batch
# shell writes its job's number into its own file, by which the next attempt tells the two apart.
#
# A warning may come while begin still works. Every script starts with a trap that sets EARLY, or the warning would end it.
set -uo pipefail # not -e: what fails is looked at

# note EVENT [FIELD]: one line in the run's metrics, which `recalign status` reads when the job is long gone. Under a
# lock, because on NFS two nodes that append at once may write to the same place.
note() {
  {
    flock 8 2>/dev/null
    printf '{"event": "%s", "time_s": %s, "pid": %s, "job": "%s", "restart": %s, "nodes": "%s"%s}\n' \
      "$1" "$(date +%s.%N)" $$ "$SLURM_JOB_ID" "$RESTART" "$SLURM_JOB_NODELIST" "${2:+, $2}" >&8
  } 8>>"$RUN/metrics.jsonl"
}

# begin RECIPE [key=value ...]: finds the run folder, takes it, and sets all that the steps need.
begin() {
  local found
  RESTART=${SLURM_RESTART_COUNT:-0} WARNED="" PATIENCE=""
  nodes
  found=$(once "${HOSTS[0]}" "${RECALIGN_PREFIX[@]}" "$RECALIGN_PYTHON" -m launch.cluster.where "$@") || exit 2
  { read -r RUN; read -r LAUNCHER; read -r PROCESSES STAGES; } <<<"$found"
  export LAUNCHER
  LOGS=$RUN/logs/job-$SLURM_JOB_ID-$RESTART
  mkdir -p "$RUN/slurm" && hold && mkdir -p "$LOGS" || exit 2
  note attempt
  [ "$RESTART" -gt 0 ] || rm -f "$RUN/slurm/warned" # a new submission may ask for more time
  echo "[batch] job $SLURM_JOB_ID, attempt $RESTART, on ${HOSTS[*]}: $RUN"
  forget_stop
  ! stopped || finish 0
  trap warned USR1
  [ -z "${EARLY:-}" ] || warned
}

# nodes: the hosts of the allocation, and what all processes on them find in their environment.
nodes() {
  mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  PER_NODE=${RECALIGN_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
  export RECALIGN_PYTHON RECALIGN_INTERFACE PER_NODE TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
  local cores=${SLURM_CPUS_ON_NODE:-$PER_NODE}
  THREADS_GIVEN=${OMP_NUM_THREADS:-}
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > PER_NODE ? cores / PER_NODE : 1))}
  # Another one every time: nodes may be shared, and whoever had the last one may still be ending.
  export MASTER_PORT=$((20000 + RANDOM % 12000))
  [ -n "${SLURM_GPUS_ON_NODE:-}" ] || export DS_ACCELERATOR=cpu
  if [ -n "$RECALIGN_INTERFACE" ]; then
    export NCCL_SOCKET_IFNAME=$RECALIGN_INTERFACE GLOO_SOCKET_IFNAME=$RECALIGN_INTERFACE
  fi
}

# hold: the only right to work on this run, until this shell ends. A file server may keep the lock of this job's last
# attempt for minutes after its node has died.
hold() {
  local patience=30 lock=$RUN/.job.lock
  exec 9>>"$lock"
  grep -qs " in SLURM job $SLURM_JOB_ID\$" "$lock" && patience=300
  if ! flock --wait $patience 9; then
    echo "error: $RUN is in use: its job runs as $(cat "$lock")"
    return 1
  fi
  echo "process $$ on $HOSTNAME in SLURM job $SLURM_JOB_ID" >"$lock"
}

warned() {
  [ -z "$WARNED" ] || return
  WARNED=yes
  note warned
  echo "[batch] warned: stopping at the next step"
  ask_to_stop warned
  { sleep "$RECALIGN_GRACE_S" && kill_steps; } 9>&- &
  PATIENCE=$!
}

# kill_steps: every step of the job, one by one: to kill the job's steps at once would be to cancel the job. The second
# half of a heterogeneous job has a number of its own.
kill_steps() {
  squeue --noheader --steps --jobs="$SLURM_JOB_ID${SLURM_JOB_ID_HET_GROUP_1:+,$SLURM_JOB_ID_HET_GROUP_1}" --format=%i | grep -v -e batch -e extern |
    xargs -r -n 1 scancel --signal=KILL 2>/dev/null
}

stopped() { [ -e "$RUN/STOP" ]; }
ask_to_stop() { (set -C; echo "job $SLURM_JOB_ID: $1" >"$RUN/STOP") 2>/dev/null; } # a person's file stays a person's
forget_stop() { ! grep -qs '^job ' "$RUN/STOP" || rm -f "$RUN/STOP"; }

join() { local IFS=,; echo "$*"; }

# once HOST COMMAND...: beside whatever else runs there.
once() {
  local host=$1; shift
  srun "${RECALIGN_SRUN[@]}" ${STEP_OPTIONS:-} --overlap --nodes=1 --ntasks=1 --nodelist="$host" "$@"
}

# address HOST: of its fast interface, or what its name resolves to.
address() {
  local command="hostname --ip-address"
  [ -n "$RECALIGN_INTERFACE" ] && command="ip -4 -o addr show dev $RECALIGN_INTERFACE | awk '{sub(\"/.*\", \"\", \$4); print \$4}'"
  srun --overlap --nodes=1 --ntasks=1 --nodelist="$1" bash -c "$command" | awk '{print $1; exit}'
}

# head_address HOST...: of the first one, at which the others find it; fails if they could not.
head_address() {
  local found
  found=$(address "$1")
  if [ -z "$found" ]; then
    echo "error: $1 has no address${RECALIGN_INTERFACE:+ on $RECALIGN_INTERFACE}: set RECALIGN_INTERFACE in site.sh" >&2
    return 2
  fi
  # Several nodes may be one machine, as in a test; then loopback reaches all of them.
  if [[ $found == 127.* ]] && [ "$(srun --overlap --nodes=$# --ntasks=$# --nodelist="$(join "$@")" hostname | sort -u | wc -l)" -gt 1 ]; then
    echo "error: the name of $1 means $found there, where no other node finds it: set RECALIGN_INTERFACE in site.sh" >&2
    return 2
  fi
  echo "$found"
}

# step NAME HOSTS TASKS_PER_NODE COMMAND...: one step on these nodes, its output in the attempt's folder of logs.
step() {
  local name=$1 per_node=$3 hosts=(${2//,/ }); shift 3
  srun "${RECALIGN_SRUN[@]}" ${STEP_OPTIONS:-} --kill-on-bad-exit=1 --open-mode=append --nodes=${#hosts[@]} \
    --ntasks=$((${#hosts[@]} * per_node)) --ntasks-per-node="$per_node" --nodelist="$(join "${hosts[@]}")" \
    --output="$LOGS/$name-%t.log" "${RECALIGN_PREFIX[@]}" "$@"
}

# ranks NAME HOSTS MODULE ARGUMENT...: a training job, one launcher on each node. In single quotes, because each node
# has to fill in its own number; of a step on some of the nodes these numbers count from 0 too.
ranks() {
  local name=$1 hosts=$2; shift 2
  # Into a log of the attempt, as any other mistake, of which finish takes it for one.
  MASTER_ADDR=$(head_address ${hosts//,/ } 2>"$LOGS/$name-address.log") || { cat "$LOGS/$name-address.log"; return 2; }
  [ -s "$LOGS/$name-address.log" ] || rm "$LOGS/$name-address.log"
  export MASTER_ADDR
  step "$name" "$hosts" 1 bash -c 'exec "$RECALIGN_PYTHON" -m accelerate.commands.launch --config_file "$LAUNCHER" \
    --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * PER_NODE)) --machine_rank "$SLURM_NODEID" \
    --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT" -m "$@"' _ "$@"
}

# wait_for PID: its exit code. Looked for, not waited for: a trap that interrupts wait in the moment in which the process
# ends makes bash lose the code.
wait_for() {
  while kill -0 "$1" 2>/dev/null; do sleep 0.5; done
  wait "$1"
}

# place: something that changes when the run gets any further: a checkpoint of any stage, samples, results.
place() {
  (cd "$RUN" && find . -mindepth 1 \( -name '.*' -o -path ./logs -o -path ./slurm \) -prune -o \
    -name 'step-*' -prune -print -o \( -name 'batch-*' -o -name '*.json' \) -print | sort | cksum)
}

# too_often: whether this warned attempt and those just before it have all ended in the same place. A job may be warned
# as it begins, but where the time is too short to get any further, requeueing is no use.
too_often() {
  local now before="" times=0
  now=$(place)
  { read -r before; read -r times; } 2>/dev/null <"$RUN/slurm/warned"
  [ "$now" = "$before" ] && times=$((times + 1)) || times=0
  printf '%s\n%s\n' "$now" "$times" >"$RUN/slurm/warned"
  [ "$times" -ge "${RECALIGN_MAX_FUTILE:-3}" ]
}

# finish CODE: the job's end. One that was warned, or that died but had got further than before, is requeued.
finish() {
  local code=$1 why="" mistakes
  trap '' USR1
  # Or it could outlive this attempt, and kill the steps of the next one.
  [ -z "$PATIENCE" ] || kill "$PATIENCE" 2>/dev/null
  forget_stop
  mistakes=$(grep -hs '^error: ' "$LOGS"/*.log | sort -u)
  if [ -e "$RUN/result.json" ]; then
    note finished; echo "[batch] finished"; exit 0
  elif stopped; then
    note stopped; echo "[batch] stopped by $RUN/STOP; without that file, the same submission goes on"; exit 0
  elif [ -n "$WARNED" ] && too_often; then
    echo "error: warned again and again before the run got any further: it needs more time (--time)"
  elif [ -n "$WARNED" ]; then
    why=warned
  elif [ -n "$mistakes" ]; then # a requeue would repeat them
    echo "$mistakes"
  elif [ "$(place)" != "$(cat "$RUN/slurm/place" 2>/dev/null)" ]; then
    place >"$RUN/slurm/place"
    why="died with exit code $code"
  fi
  if [ -n "$why" ] && [ "$RESTART" -lt "$RECALIGN_MAX_REQUEUES" ]; then
    note requeued "\"why\": \"$why\""
    echo "[batch] $why: requeueing"
    # A batch script that ends within the grace time counts as completed, and is not requeued by itself.
    scontrol requeue "$SLURM_JOB_ID" && sleep 300 && exit $((code ? code : 75))
  fi
  note failed "\"code\": $code"; echo "[batch] failed with exit code $code; see $LOGS"; exit $((code ? code : 1))
}

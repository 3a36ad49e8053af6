# What the scripts of alignment share: trainer and generators as two steps of one job, which meet in the run folder.
GENERATOR_RESTARTS=3 GAVE_UP=3

# refuse WHY: the job's end, for a mistake of whoever submitted it.
refuse() { echo "error: $1" >"$LOGS/batch.log"; finish 2; }

# divide: which nodes train and which generate, and how many processes each of them starts.
divide() {
  local n=${GENERATOR_NODES:-1}
  if [ "$n" -lt 0 ] || { [ "$n" -eq 0 ] && [ ${#HOSTS[@]} -gt 1 ]; }; then
    refuse "GENERATOR_NODES=$n of ${#HOSTS[@]} nodes: 0 divides one node"
  fi
  if [ "$n" -gt 0 ]; then
    GENERATORS=${GENERATORS:-$PER_NODE}
    TRAINERS=("${HOSTS[@]:0:${#HOSTS[@]}-n}") GENERATORS_ON=("${HOSTS[@]: -n}")
    TRAINER_OPTIONS="" GENERATOR_OPTIONS=""
    [ ${#TRAINERS[@]} -gt 0 ] || refuse "${#HOSTS[@]} nodes leave none to train on beside $n that generate"
  else
    GENERATORS=${GENERATORS:-1}
    TRAINERS=("${HOSTS[0]}") GENERATORS_ON=("${HOSTS[0]}")
    divide_node "${SLURM_GPUS_ON_NODE:-0}" "$SLURM_CPUS_ON_NODE"
  fi
}

# divide_node GPUS CORES: of the one node. A single GPU is shared, and so are cores that are too few.
divide_node() {
  local gpus=$1 cores=$2 theirs
  if [ "$gpus" -gt 1 ]; then
    PER_NODE=$((PER_NODE - GENERATORS))
    [ $PER_NODE -gt 0 ] || refuse "$gpus GPUs leave none to train on beside $GENERATORS generators"
  fi
  theirs=$((cores * GENERATORS / (GENERATORS + PER_NODE)))
  if [ "$gpus" -eq 1 ] || [ $theirs -lt "$GENERATORS" ]; then
    TRAINER_OPTIONS=--overlap GENERATOR_OPTIONS=--overlap
  else # memory is not divided: without --mem=0 the first step takes all of it, and the second one waits for ever
    TRAINER_OPTIONS="--exact --mem=0 --cpus-per-task=$((cores - theirs))"
    GENERATOR_OPTIONS="--exact --mem=0 --cpus-per-task=$((theirs / GENERATORS))"
    # nodes has given every process a thread for each core of the whole node.
    [ -n "${THREADS_GIVEN:-}" ] || OMP_NUM_THREADS=$(((cores - theirs) / PER_NODE > 0 ? (cores - theirs) / PER_NODE : 1))
  fi
  if [ "$gpus" -gt 1 ]; then
    TRAINER_OPTIONS+=" --gpus-per-node=$PER_NODE" GENERATOR_OPTIONS+=" --gpus-per-node=$GENERATORS"
  fi
}

# gpus_of HOST: of this job; 1 where there are none. The batch shell knows only those of its own node.
gpus_of() { once "$1" bash -c 'echo "${SLURM_GPUS_ON_NODE:-1}"'; }

# generate ARGUMENT...: the generators, started again when they die, which the trainer need not notice.
generate() {
  local attempt
  for ((attempt = 0; attempt <= GENERATOR_RESTARTS; attempt++)); do
    STEP_OPTIONS=$GENERATOR_OPTIONS step generator "$(join "${GENERATORS_ON[@]}")" "$GENERATORS" bash -c '
      [ -n "${SLURM_GPUS_ON_NODE:-}" ] && export CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLURM_LOCALID + 1)) <<<"$CUDA_VISIBLE_DEVICES")
      exec "$RECALIGN_PYTHON" -m align.generator --number "$SLURM_PROCID" --config "$@"' _ "$@" && return 0
    stopped && return 0
    # A mistake would be the same again.
    grep -qs '^error: ' "$LOGS"/generator-*.log && break
    note restarted '"job_part": "generator"'
    echo "[batch] the generator died; starting it again"
  done
  echo "[batch] the generator cannot go on: stopping the trainer at its next step"
  ask_to_stop "the generator cannot go on"
  return $GAVE_UP
}

# align RECIPE [key=value ...]: all stages; those before and after the two jobs run on the first trainer node.
align() {
  local placement=("align.trainer.processes=$((${#TRAINERS[@]} * PER_NODE))"
    "align.generator.processes=$((${#GENERATORS_ON[@]} * GENERATORS))") code
  export PER_NODE
  stage before --stop-before-alignment "$@" "${placement[@]}"
  STEP_OPTIONS=$TRAINER_OPTIONS ranks trainer "$(join "${TRAINERS[@]}")" align.trainer --config "$@" "${placement[@]}" &
  local trainer=$!
  generate "$@" "${placement[@]}" &
  local generators=$!
  wait_for $trainer
  code=$?
  # Whatever the trainer ended with, nobody reads what they would still write; they may be done, or just stopping.
  for _ in {1..20}; do kill -0 $generators 2>/dev/null && sleep 0.5; done
  kill -TERM $generators 2>/dev/null
  kill_steps
  wait_for $generators
  [ $? -ne $GAVE_UP ] || code=$GAVE_UP
  if [ $code -ne 0 ] || stopped; then finish $code; fi
  stage after "$@" "${placement[@]}"
  finish 0
}

# stage NAME ARGUMENT...: `recalign align` on the first trainer node; ends the job if it fails or is stopped.
stage() {
  local name=$1; shift
  STEP_OPTIONS=$TRAINER_OPTIONS step "$name" "${TRAINERS[0]}" 1 "$RECALIGN_PYTHON" -m launch.cli align "$@" &
  wait_for $!
  local code=$?
  if [ $code -ne 0 ] || stopped; then finish $code; fi
}

# What `recalign check --folder DIR` runs in an allocation, after site.sh and lib.sh: one process on each node, in the
# container and over the network that jobs would take. The first node is the head, as it is theirs.
nodes
MASTER_ADDR=$(head_address "${HOSTS[@]}") || exit 2
export MASTER_ADDR
# The first node's exit code is the answer: the others may end in peace, but not wait for ever.
exec srun "${RECALIGN_SRUN[@]}" --overlap --kill-on-bad-exit=0 --wait=60 --nodes=${#HOSTS[@]} --ntasks=${#HOSTS[@]} \
  --ntasks-per-node=1 --nodelist="$(join "${HOSTS[@]}")" \
  "${RECALIGN_PREFIX[@]}" "$RECALIGN_PYTHON" -m launch.cluster.check --folder "$1"

# The settings of your site, and the only file that you need to change. Read by every launch/slurm/*.sbatch; `recalign
# submit` copies it into the script that it submits. Before calling sbatch yourself, source it: sbatch reads SBATCH_*.

# --- what the scheduler is told ---
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my-project
# export SBATCH_QOS=normal
# export SBATCH_TIMELIMIT=24:00:00
# export SBATCH_GPUS_PER_NODE=8
# A job gets the cores and the memory that it asks for, which by default may be one core: whole nodes, or a share for
# each GPU. All of the memory of whole nodes: 0.
# export SBATCH_EXCLUSIVE=1
# export SBATCH_CPUS_PER_GPU=16
# export SBATCH_MEM_PER_NODE=0

# --- the environment on the nodes ---
# module load cuda gcc
RECALIGN_PYTHON=${RECALIGN_PYTHON:-$PWD/.venv/bin/python}
# What comes before every command on a node, e.g. (apptainer exec --nv --bind /scratch recalign.sif), and more options
# of srun, e.g. (--container-image=recalign.sqsh --container-mounts=/scratch).
RECALIGN_PREFIX=()
RECALIGN_SRUN=()

# --- the network ---
# The interface of the fast network, e.g. ib0 or hsn0; empty: the address that the host's name resolves to.
RECALIGN_INTERFACE=${RECALIGN_INTERFACE:-}
# Seconds that ranks wait for each other before they give up: longer than anything that one of them does alone.
export RECALIGN_TIMEOUT_S=${RECALIGN_TIMEOUT_S:-1800}
# Compute nodes seldom reach the internet: fetch models beforehand.
# export HF_HUB_OFFLINE=1

# --- processes ---
# Ranks of a training job, and generators, on each node; empty: one for every GPU, one where there are none.
RECALIGN_PER_NODE=${RECALIGN_PER_NODE:-}

# --- interruptions ---
# The time limit is always warned of. Before a preemption the scheduler sends the warning only if slurm.conf says
# SlurmctldParameters=preempt_send_user_signal and the partition has a GraceTime; without it the steps since the last
# checkpoint are done again.
# Seconds from the warning on that a job gets to save before its processes are killed and it is requeued. Well below the
# seconds of --signal in the scripts, and below the GraceTime of partitions that are preempted.
RECALIGN_GRACE_S=${RECALIGN_GRACE_S:-90}
RECALIGN_MAX_REQUEUES=${RECALIGN_MAX_REQUEUES:-100}
# Times in a row that a job is requeued because it was warned, although it has got no further.
RECALIGN_MAX_FUTILE=${RECALIGN_MAX_FUTILE:-3}

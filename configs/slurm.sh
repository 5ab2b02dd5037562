#!/usr/bin/env bash
# A study on a Slurm cluster: sbatch configs/slurm.sh [flags of train.py]
#
#   MODE=data sbatch configs/slurm.sh …     all GPUs train one run at a time, each on its share of a step's examples
#   MODE=runs sbatch configs/slurm.sh …     each GPU trains runs of its own (--shard runs), from one queue: the better one where the
#                                           model fits on a GPU and there are more runs than GPUs
#   MODE=model sbatch configs/slurm.sh …    --full --shard model, for weights that do not fit on one GPU
#
# Killed, requeued or out of time, the same command goes on from the newest checkpoints: submit it again, with the same --out.
#SBATCH --job-name=lethe
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64              # all of a node's; MODE=runs shares them out
#SBATCH --requeue                       # after a node has failed, and …
#SBATCH --signal=TERM@120               # … two minutes before the time is over: the step is finished and saved, exit status 130
set -euo pipefail

MODE=${MODE:-data}
GPUS=${SLURM_GPUS_ON_NODE:-8}
cd "${SLURM_SUBMIT_DIR:-.}"             # the checkout, on a file system that all nodes see; so must --out be
# source venv/bin/activate
export HF_HUB_OFFLINE=1                 # nodes without a network: fetch the model and the data beforehand, where there is one
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# Where ranks find each other: the first node, and a port that follows from the job, so that two jobs on a node do not meet.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)  # not head: what it leaves unread would end the script
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

case $MODE in
data | model)
    # One torchrun a node starts a process for each of its GPUs. A rank that dies ends them all; they are started again up to three
    # times and go on from the checkpoint.
    more=()
    [ "$MODE" = model ] && more=(--full --shard model)
    exec srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" \
        torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" --max-restarts 3 --rdzv-backend c10d \
        --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" train.py ${more[@]+"${more[@]}"} "$@"
    ;;
runs)
    # One process a GPU, without torchrun, so that one that dies takes no other along: its run is taken over by those that live.
    # (Rank 0 holds the queue. When that one dies all end, and the job is to be submitted again.)
    # shellcheck disable=SC2016 — the names are those of each task, so the inner shell fills them in
    exec srun --kill-on-bad-exit=0 --ntasks $((SLURM_NNODES * GPUS)) --ntasks-per-node "$GPUS" --gpus-per-task 1 \
        --cpus-per-task $((${SLURM_CPUS_PER_TASK:-GPUS} / GPUS)) bash -c \
        'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=0 exec python train.py --shard runs "$@"' train.py "$@"
    ;;
*)
    echo "error: MODE=$MODE is unknown; give data, runs or model" >&2
    exit 2
    ;;
esac

#!/usr/bin/env bash
# Train with a recipe as a Slurm job, one process for each GPU:
#   sbatch scripts/slurm.sh configs/sent_1.5b.yaml [further options of fit]
#   sbatch --nodes 2 scripts/slurm.sh configs/sent_14b.yaml
#   sbatch --ntasks-per-node 4 --gpus-per-node 4 scripts/slurm.sh configs/sent_1.5b.yaml
#SBATCH --job-name=sent
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=2-00:00:00
#SBATCH --requeue
#SBATCH --signal=SIGUSR1@1800
#SBATCH --output=slurm-%j.log
set -euo pipefail
config=${1:?usage: sbatch scripts/slurm.sh CONFIG [options of fit]}
shift
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Half an hour before the end (--signal) a checkpoint is written after the step under way and the job queued again; it goes on
# from there, in the same folder (docs/reliability.md). It must be longer than a step and a validation take.
exec srun --kill-on-bad-exit=1 python -m lightning_rlvr fit --config "$config" --ckpt_path last \
    --trainer.devices "$SLURM_NTASKS_PER_NODE" --trainer.num_nodes "$SLURM_NNODES" "$@"

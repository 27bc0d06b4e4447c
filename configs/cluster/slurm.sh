#!/usr/bin/env bash
#SBATCH --job-name=dft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# A run under SLURM, one task a GPU, that goes on after pre-emption and beyond the time limit of one job:
#
#   sbatch configs/cluster/slurm.sh --config configs/base.yaml --config configs/dft.yaml --config configs/models/….yaml
#   sbatch --array=0-4 configs/cluster/slurm.sh …     each task of the array has a run folder and a seed of its own
#   RUN_DIR=runs/mine sbatch …           the run's folder, by default of the job's name and number; --run_dir is not heard
#   STRATEGY=fsdp2 sbatch …              weights, gradients and optimizer states dealt over all ranks, not whole on each
#   STRATEGY=FSDP2Strategy sbatch … --trainer.strategy.replicate NODES       dealt over the ranks of each node
#
# Five minutes before the time limit SLURM sends SIGUSR1 to the tasks, and SIGTERM where it pre-empts the job: the
# partition's GraceTime has to cover a step and a checkpoint. The ranks finish their step together, save
# and leave with 85. This script then has the job requeued, and the same command goes on. Any other code ends the job.
set -uo pipefail
trap : TERM USR1 # this shell outlives a signal to the whole job, and decides when srun is back

run=${RUN_DIR:-"runs/$SLURM_JOB_NAME-${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}"}
own=() # what a file of the configuration must not decide
if [[ -n ${SLURM_ARRAY_TASK_ID:-} ]]; then
    run+="-$SLURM_ARRAY_TASK_ID"
    own=(--seed_everything "$SLURM_ARRAY_TASK_ID")
fi
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs may share a node
echo "start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-this node}"

# A rank that dies takes the others along after a minute; ranks that leave together are given that minute, too.
srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    dft fit --trainer.strategy "${STRATEGY:-ddp}" "$@" --run_dir "$run" "${own[@]}" \
    --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
code=$?
echo "srun left with $code"
if ((code == 85)); then
    scontrol requeue "$SLURM_JOB_ID" # in an array this is the id of the one task
fi
exit "$code"

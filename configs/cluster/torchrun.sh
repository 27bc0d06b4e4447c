#!/usr/bin/env bash
# A run on one node or several by torchrun; the same line on each node, in any order:
#
#   NODES=2 HEAD=node0:29500 configs/cluster/torchrun.sh --config configs/base.yaml --config configs/dft.yaml …
#
# NODES     how many nodes (1)
# HEAD      host:port of one of them, where they all meet (localhost:29500)
# GPUS      processes a node (one for each GPU)
# STRATEGY  ddp: each rank has the whole model; fsdp2: weights, gradients and optimizer states are dealt over all ranks;
#           FSDP2Strategy with --trainer.strategy.replicate NODES at the end of the line: over those of a node (ddp)
# RESTARTS  a rank that dies takes the others along, and all start again from the last checkpoint, so many times (3)
# GRACE     seconds that the ranks have for their step and a checkpoint after SIGTERM or SIGUSR1 to this script (300);
#           torch before 2.12 knows no such time, and kills them after 30
#
# Leaves with 85 where it was asked to leave and wants to be started again; torchrun itself leaves with 1 then. Where
# only one node is asked, the ranks of all nodes save; the other nodes wait for it to come back (ten minutes).
set -uo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${GRACE:-300} # torchrun kills its ranks after half a minute otherwise

asked='' launcher=''
trap 'asked=yes; kill -TERM "$launcher"' TERM USR1
torchrun --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id "${RUN_ID:-dft}" \
    -m dft_lightning fit --trainer.strategy "${STRATEGY:-ddp}" \
    --trainer.num_nodes "${NODES:-1}" --trainer.devices "${GPUS:-auto}" "$@" &
launcher=$!
code=0
while kill -0 "$launcher" 2>/dev/null; do
    wait "$launcher" # a signal ends the waiting, not the launcher
    code=$?
done
[[ -n $asked ]] && exit 85
exit "$code"

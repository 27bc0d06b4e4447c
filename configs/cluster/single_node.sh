#!/usr/bin/env bash
# A run on all GPUs of this machine:
#
#   configs/cluster/single_node.sh --config configs/base.yaml --config configs/dft.yaml --config configs/models/….yaml
#
# GPUS      how many (all)
# STRATEGY  ddp: each has the whole model; fsdp2: its weights, gradients and optimizer states are dealt over them (ddp)
#
# SIGTERM or SIGUSR1 to its first process is enough; it leaves with 85 then, and the same line goes on. As a service:
# Restart=on-failure, KillMode=mixed, and TimeoutStopSec long enough for a step and a checkpoint.
set -euo pipefail
exec dft fit --trainer.strategy "${STRATEGY:-ddp}" --trainer.devices "${GPUS:-auto}" "$@"

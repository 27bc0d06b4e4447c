#!/usr/bin/env bash
# A run in a container, for any scheduler of containers; IMAGE as the Dockerfile makes it:
#
#   IMAGE=dft-lightning configs/cluster/container.sh --config configs/base.yaml --config configs/dft.yaml …
#
# STRATEGY=fsdp2 deals the weights, gradients and optimizer states over its GPUs; by default each has them whole (ddp).
#
# What matters is the same everywhere: the run folder outlives the container (a volume); `dft` is process 1, so that a
# stop reaches it; the grace is long enough for a step and a checkpoint (terminationGracePeriodSeconds
# elsewhere); exit code 85 means "start me again" (restartPolicy OnFailure, or a podFailurePolicy that ignores 85).
set -uo pipefail
exec "${DOCKER:-docker}" run --rm --gpus "${GPUS:-all}" --shm-size 8g --user "$(id -u):$(id -g)" --stop-timeout 300 \
    --volume dft-cache:/cache --volume "$PWD/runs:/workspace/runs" "${IMAGE:-dft-lightning}" fit \
    --trainer.strategy "${STRATEGY:-ddp}" "$@"

# dft-lightning on GPU nodes.
#
#   docker build --tag dft-lightning .
#   mkdir -p runs
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" \
#       --volume dft-cache:/cache --volume "$PWD/runs:/workspace/runs" dft-lightning fit \
#       --config configs/base.yaml --config configs/dft.yaml --config configs/models/qwen2.5-math-1.5b.yaml
#
# Several processes: `--entrypoint torchrun`. The node needs only the NVIDIA driver and its container toolkit: torch's
# wheel on PyPI brings CUDA 13.0 along (driver 580 or later). For an older driver, name PyTorch's index of an older
# CUDA: `--build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cu…`.

# The Python that constraints.txt was made with. A CUDA base image would hold CUDA, cuDNN and NCCL a second time.
FROM python:3.11.14-slim-bookworm

LABEL org.opencontainers.image.title="dft-lightning" \
      org.opencontainers.image.description="A Lightning trainer for causal language models in which what each token is worth is a pluggable weighting" \
      org.opencontainers.image.licenses="MIT"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# gcc and libc6-dev: Triton compiles the launcher of each kernel. ibverbs: without it NCCL leaves InfiniBand unused and
# goes over TCP between nodes, without an error. The stars let Debian's security fixes in.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
        gcc=4:12.2.* \
        ibverbs-providers=44.* \
        libc6-dev=2.36-* \
        libibverbs1=44.* \
 && rm -rf /var/lib/apt/lists/*

# pip reads it from the environment; for the build only.
ARG PIP_EXTRA_INDEX_URL

# Dependencies: built anew only when pyproject.toml or constraints.txt changes, not with the source.
WORKDIR /opt/dft-lightning
COPY pyproject.toml constraints.txt ./
RUN python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; print(*project["dependencies"], *project["optional-dependencies"]["peft"], sep="\n")' > requirements.txt \
 && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE ./
COPY dft_lightning dft_lightning
RUN pip install --no-cache-dir --no-deps . \
 && rm -rf build ./*.egg-info

# /cache and /workspace can be written by any user, for clusters that start containers under the user's own id;
# such an id has no home, hence HOME.
RUN useradd --uid 1000 --home-dir /workspace --no-create-home dft \
 && mkdir --parents /cache/huggingface /workspace/runs \
 && chown --recursive dft:dft /cache /workspace \
 && chmod --recursive 1777 /cache /workspace
WORKDIR /workspace
COPY --chown=dft:dft configs configs

ENV HOME=/workspace \
    HF_HOME=/cache/huggingface \
    DFT_CACHE=/cache/dft-lightning \
    XDG_CACHE_HOME=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1

# Threads of the tokenizers library do not survive the fork of a data worker.
# hadolint ignore=DL3064
ENV TOKENIZERS_PARALLELISM=false

VOLUME ["/cache"]
USER 1000:1000

ENTRYPOINT ["dft"]
CMD ["--help"]

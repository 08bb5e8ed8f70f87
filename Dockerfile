# docker build --target cpu -t r3serve:cpu --build-arg VERSION=$(git describe --tags | sed s/^v//) .
# docker build --target gpu -t r3serve:gpu --build-arg VERSION=… .
FROM python:3.11-slim-bookworm AS base
# KubeRay's init container waits for the head with `ray health-check`; its exec probes use wget.
RUN apt-get update \
 && apt-get install -y --no-install-recommends wget procps \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 1000 --user-group --create-home ray
# /opt/r3serve is the working directory of every pod: config files, and modules, are found from it.
WORKDIR /opt/r3serve
COPY constraints constraints
COPY pyproject.toml README.md LICENSE ./
COPY serve_app serve_app
COPY graphs graphs
COPY examples examples
# The build context has no .git to ask.
ARG VERSION=0.0.0
ENV SETUPTOOLS_SCM_PRETEND_VERSION_FOR_R3SERVE=$VERSION \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

FROM base AS cpu
# For PyTorch's CPU build name its index: --build-arg EXTRA_INDEX=…
ARG EXTRA_INDEX=
RUN PIP_EXTRA_INDEX_URL=$EXTRA_INDEX pip install -c constraints/cpu.txt .
# The demo's model; graphs/rollout.yaml names it.
RUN python -m examples.tiny_moe checkpoints/tiny-qwen3-moe
USER 1000

FROM base AS gpu
# Triton compiles its kernels when they are first used, with a C compiler.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints/cuda.txt '.[lmdeploy]'
USER 1000

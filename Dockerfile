# syntax=docker/dockerfile:1
# docker build --target cpu -t perft-server:cpu .      vLLM's CPU kernels, from the lock file
# docker build --target cuda -t perft-server:cuda .    vLLM with CUDA, for GPU machines
#
# `--build-arg TORCH_INDEX=URL` names another index for PyTorch's CPU build. deploy/try-image.sh builds the first one, runs
# it and asks it. Both run as user 10001: what is mounted must be readable for it, its home folder (the store, compiled
# kernels, downloads) writable; the rest of the file system may be read-only, with a tmpfs at /tmp.
#
# On a GPU (NVIDIA Container Toolkit), with the adapters in /srv/adapters and both keys in the shell's environment. The
# volume perft-home keeps the store and the downloaded model; deploy/compose.yaml adds Prometheus and Grafana.
#
# docker run --gpus all --shm-size 2g -p 127.0.0.1:8000:8000 -e PERFT_ADMIN_KEY -e PERFT_API_KEYS \
#   -v perft-home:/home/perft -v /srv/adapters:/adapters:ro perft-server:cuda \
#   serve allenai/OLMoE-1B-7B-0924 --host 0.0.0.0 --adapter NAME=/adapters/NAME

FROM python:3.11.13-slim-bookworm AS base
RUN apt-get update \
 && apt-get install -y --no-install-recommends libnuma1 curl \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 perft
ENV HOME=/home/perft PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 VLLM_NO_USAGE_STATS=1
WORKDIR /opt/perft

FROM base AS cpu
COPY requirements/cpu.txt requirements/cpu.txt
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-deps --index-url "$TORCH_INDEX" "$(grep '^torch==' requirements/cpu.txt)" \
 && pip install --no-deps -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY perft perft
COPY adapters adapters
COPY server server
RUN pip install --no-deps --no-build-isolation .
ENV VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=4
USER perft
WORKDIR /home/perft
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m CMD curl -fsS http://127.0.0.1:8000/ready || exit 1
ENTRYPOINT ["perft"]
CMD ["--help"]

FROM base AS cuda
# Triton compiles its launchers when the server runs.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE ./
COPY perft perft
COPY adapters adapters
COPY server server
# cuda,ray: for the replicas of Ray Serve (deploy/kubernetes/ray)
ARG EXTRAS=cuda,bucket
RUN pip install ".[$EXTRAS]"
USER perft
WORKDIR /home/perft
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=30m CMD curl -fsS http://127.0.0.1:8000/ready || exit 1
ENTRYPOINT ["perft"]
CMD ["--help"]

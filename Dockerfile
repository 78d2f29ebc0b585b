# Tightfit for NVIDIA GPUs, for the chart in helm/ and for `docker run`. Needs a driver of 580 or later on the host.
#   docker build --tag tightfit:0.1.0 .
# `make image-check` runs the steps on Debian, without CUDA and without a container engine.

FROM nvidia/cuda:13.0.1-base-ubuntu24.04 AS build
# Mirrors keep the newest version of a package only: a pinned one would soon break this.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/tightfit
ENV PATH=/opt/tightfit/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
# What is large and changes seldom is a layer of its own. torch for CUDA pins a Triton of its own.
COPY ci/constraints.txt ./
RUN sed -i '/^triton==/d' constraints.txt \
 && pip install --constraint constraints.txt torch==2.13.0 'ray[default]==2.60.0'
COPY . ./tightfit
RUN pip install --constraint constraints.txt './tightfit[cuda,tracing]'

FROM nvidia/cuda:13.0.1-base-ubuntu24.04
# gcc and Python's headers: Triton compiles the launcher of each kernel when it is first used. wget: KubeRay's probes.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends \
      ca-certificates gcc libc6-dev python3 python3-dev tini wget \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --user-group --create-home tightfit \
 && install --directory --owner=tightfit --group=tightfit /checkpoints
COPY --from=build /opt/tightfit /opt/tightfit
# A Ray that is started here asks everybody for the cluster's token, and reports to nobody.
ENV PATH=/opt/tightfit/bin:$PATH \
    PYTHONSAFEPATH=1 \
    HF_HOME=/checkpoints \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0
USER 10001:10001
WORKDIR /home/tightfit
EXPOSE 50051
ENTRYPOINT ["tini", "--"]
CMD ["tightfit", "--help"]

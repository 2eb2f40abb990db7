# The server as an image. CPU:  docker build -t mnemosyne .
#                         CUDA: docker build -t mnemosyne:cuda --build-arg DEVICE=cuda .
# TORCH_INDEX names the package index that torch comes from; PyTorch lists one for the CPU and one per CUDA version.
# Left empty, pip's own is used, whose Linux builds of torch bring CUDA with them.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
RUN python3 -m venv /opt/mnemosyne
# Torch alone first: its layer is by far the largest and changes least.
COPY requirements/lock.txt requirements/lock.txt
RUN /opt/mnemosyne/bin/pip install "$(grep '^torch==' requirements/lock.txt)" -c requirements/lock.txt \
    ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"}
COPY pyproject.toml README.md LICENSE ./
COPY checkpoints checkpoints
COPY engine engine
COPY kernels kernels
COPY server server
COPY training training
RUN /opt/mnemosyne/bin/pip install . -c requirements/lock.txt

FROM ${PYTHON_IMAGE}
ARG DEVICE=cpu
LABEL org.opencontainers.image.title="Mnemosyne" \
      org.opencontainers.image.description="A long-context inference server for Titans models" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/mnemosyne /opt/mnemosyne
# Triton links each kernel's launcher with a C compiler, when the kernel is first used.
# hadolint ignore=DL3008
RUN if [ "${DEVICE}" != cpu ]; then \
        apt-get update \
        && apt-get install -y --no-install-recommends gcc libc6-dev \
        && rm -rf /var/lib/apt/lists/*; \
    fi
RUN groupadd --gid 10001 mnemosyne \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data mnemosyne \
    && install -d -o 10001 -g 10001 -m 0700 /data
ENV PATH=/opt/mnemosyne/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MNEMOSYNE_HOST=0.0.0.0 \
    MNEMOSYNE_PORT=8000 \
    MNEMOSYNE_DATA_DIR=/data \
    MNEMOSYNE_DEVICE=${DEVICE}
# By number, so that an orchestrator can see that it isn't root.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(f\"http://127.0.0.1:{os.environ['MNEMOSYNE_PORT']}/health/live\", timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["mnemosyne"]
CMD ["serve"]

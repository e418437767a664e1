# Select-MoE in one image: the stages (`selectmoe ...`), KFP's executor and `mlflow server`. `make image` builds it, or:
#
#   docker build --target cpu --tag select-moe:dev .
#   docker build --target gpu --tag select-moe:dev-gpu .
#
# Both targets hold the same code; only torch's build differs. Nothing is installed at run time. A container needs no
# root, no capability and no writable root file system: what is temporary goes to /tmp, the one mount that it asks for.
# BuildKit or Buildah builds it: the tools that install are mounted, not copied, and gigabytes are written once.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base

# What pyproject.toml says of dependencies; the tools' settings behind it would only make the packages' layer anew.
FROM base AS wanted
WORKDIR /wanted
COPY pyproject.toml whole.toml
RUN sed '/^\[project.scripts\]/,$d' whole.toml > pyproject.toml

# The tools, and where this build finds packages. TORCH_WHEELS is a page of links with torch's CPU build: 2.13.0+cpu is
# newer than the index's 2.13.0, which is the CUDA build.
FROM base AS tools
ARG UV_VERSION=0.13.9
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
WORKDIR /opt/tools
COPY image/sbom.txt ./
RUN python3 -m venv . \
    && bin/pip install --no-cache-dir --disable-pip-version-check "uv==${UV_VERSION}" -r sbom.txt \
    && printf 'no-cache = true\nsystem-certs = true\nindex = [{ url = "%s", default = true }]\n' "${PIP_INDEX_URL}" > gpu.toml \
    && { printf 'find-links = ["%s"]\n' "${TORCH_WHEELS}"; cat gpu.toml; } > cpu.toml
COPY image/install.sh image/slim.py ./

# /opt/venv is here for its address alone: commands such as `selectmoe` name the interpreter that they run with.
FROM base AS code
WORKDIR /build
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY selectmoe selectmoe
COPY components components
COPY pipelines pipelines
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    python3 -m venv --without-pip /opt/venv \
    && /opt/tools/bin/uv pip install --config-file /opt/tools/gpu.toml --build-constraints requirements.lock --no-deps \
      --python /opt/venv/bin/python --target /opt/select-moe . \
    && python /opt/tools/slim.py /opt/select-moe

FROM base AS runtime
LABEL org.opencontainers.image.title="select-moe" \
      org.opencontainers.image.description="Choose fine-tuning data with a mixture-of-experts judge" \
      org.opencontainers.image.licenses="Apache-2.0"
# USER and LOGNAME: any numeric user may run this, and libraries ask for the name of one that /etc/passwd does not know.
ENV PATH=/opt/venv/bin:/opt/select-moe/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    USER=selectmoe \
    LOGNAME=selectmoe \
    HOME=/tmp \
    TMPDIR=/tmp \
    XDG_CACHE_HOME=/tmp/cache \
    XDG_CONFIG_HOME=/tmp/config \
    HF_HOME=/tmp/huggingface \
    MPLCONFIGDIR=/tmp/matplotlib \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor \
    TRITON_CACHE_DIR=/tmp/triton \
    GIT_PYTHON_REFRESH=quiet \
    DO_NOT_TRACK=true \
    MLFLOW_DISABLE_TELEMETRY=true \
    HF_HUB_DISABLE_TELEMETRY=1
COPY --chmod=0555 image/entrypoint.sh /usr/local/bin/entrypoint
WORKDIR /tmp
ENTRYPOINT ["entrypoint"]

# The packages: a layer apart from the code.
FROM runtime AS packages-cpu
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,from=wanted,source=/wanted,target=/wanted \
    --mount=type=bind,source=requirements.lock,target=/requirements.lock \
    /opt/tools/install.sh cpu

FROM runtime AS packages-gpu
RUN --mount=type=bind,from=tools,source=/opt/tools,target=/opt/tools \
    --mount=type=bind,from=wanted,source=/wanted,target=/wanted \
    --mount=type=bind,source=requirements.lock,target=/requirements.lock \
    /opt/tools/install.sh gpu

FROM packages-gpu AS gpu
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=code /opt/select-moe /opt/select-moe
USER 10001:10001

FROM packages-cpu AS cpu
ARG VERSION=dev
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=code /opt/select-moe /opt/select-moe
USER 10001:10001

# Images of Chorus: `docker build --target gateway|engine-cpu|engine-cuda -t chorus/TARGET .`
#
# Everything is pinned and hashed (requirements/*.txt). They run as user 10001 with a read-only root file system:
#   docker run --read-only --tmpfs /tmp -v "$PWD/my-population:/population:ro" -p 8000:8000 chorus/gateway serve /population ...
# Pin the base by its digest where you build: --build-arg BASE=docker.io/library/python@sha256:...
ARG BASE=docker.io/library/python:3.11.13-slim-bookworm

# ------------------------------------------------------------------------------------------------------------ the project's own wheel
FROM ${BASE} AS wheel
WORKDIR /build
COPY requirements/image-build.txt requirements/
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir --no-deps --require-hashes -r requirements/image-build.txt
COPY pyproject.toml README.md ./
COPY requirements/vllm-name requirements/vllm-name
COPY population population
COPY prior prior
COPY serve serve
COPY src src
COPY train train
RUN /venv/bin/pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . ./requirements/vllm-name

# ------------------------------------------------------------------------------------------------------------ what all images share
FROM ${BASE} AS base
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="chorus" \
      org.opencontainers.image.description="Populations of language models behind an OpenAI API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
RUN groupadd --gid 10001 chorus && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin chorus
ENV PATH=/opt/chorus/bin:$PATH \
    HOME=/tmp \
    USER=chorus \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /
STOPSIGNAL SIGTERM

# ------------------------------------------------------------------------------------------------------------ gateway
FROM ${BASE} AS gateway-packages
COPY requirements/gateway.txt /requirements.txt
RUN python -m venv /opt/chorus && /opt/chorus/bin/pip install --no-cache-dir --no-deps --require-hashes -r /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/chorus/bin/pip install --no-cache-dir --no-deps /wheels/chorus_lm-*.whl && /opt/chorus/bin/pip uninstall --yes pip setuptools

FROM base AS gateway
COPY --from=gateway-packages /opt/chorus /opt/chorus
COPY requirements/gateway.txt /usr/share/doc/chorus/requirements.txt
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=9)"]
ENTRYPOINT ["chorus"]
CMD ["serve", "/population", "--host", "0.0.0.0", "--engine", "dns+http://engine:8000"]

# ------------------------------------------------------------------------------------------------------------ engine for CPUs
FROM ${BASE} AS engine-cpu-packages
COPY requirements/engine-cpu.txt /requirements.txt
RUN python -m venv /opt/chorus && /opt/chorus/bin/pip install --no-cache-dir --no-deps --require-hashes -r /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/chorus/bin/pip install --no-cache-dir --no-deps /wheels/*.whl && /opt/chorus/bin/pip uninstall --yes pip

FROM base AS engine-cpu
# vLLM's kernels are linked against libnuma; torch compiles small kernels of its own where it sees fit. Debian keeps one version of each
# in a release, so there is nothing to pin: the release is.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=engine-cpu-packages /opt/chorus /opt/chorus
COPY requirements/engine-cpu.txt /usr/share/doc/chorus/requirements.txt
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=20s --timeout=15s --start-period=600s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=14)"]
ENTRYPOINT ["chorus"]
CMD ["engine", "serve", "/population", "--host", "0.0.0.0"]

# ------------------------------------------------------------------------------------------------------------ engine for NVIDIA GPUs
FROM ${BASE} AS engine-cuda-packages
COPY requirements/engine-cuda.txt /requirements.txt
RUN python -m venv /opt/chorus && /opt/chorus/bin/pip install --no-cache-dir --no-deps --require-hashes -r /requirements.txt
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/chorus/bin/pip install --no-cache-dir --no-deps /wheels/chorus_lm-*.whl && /opt/chorus/bin/pip uninstall --yes pip

FROM base AS engine-cuda
# CUDA's libraries come with the wheels, the driver from the node; Triton compiles its launchers with a C compiler.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/*
COPY --from=engine-cuda-packages /opt/chorus /opt/chorus
COPY requirements/engine-cuda.txt /usr/share/doc/chorus/requirements.txt
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=20s --timeout=15s --start-period=600s --retries=6 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=14)"]
ENTRYPOINT ["chorus"]
CMD ["engine", "serve", "/population", "--host", "0.0.0.0"]

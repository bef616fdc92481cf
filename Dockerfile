# search-e1 for a CPU or an NVIDIA GPU. docs/gpu.md says how it is built and run.
FROM python:3.11-slim-bookworm

# cpu: torch's CPU build. gpu: the build of PyPI with its CUDA libraries; the host needs NVIDIA's driver and container toolkit.
ARG DEVICE=cpu
ARG EXTRAS=documents,serve
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
WORKDIR /opt/search-e1

# The largest layer is the first: it changes with the pins alone. Triton compiles its launchers with gcc; any version works.
COPY constraints.txt ./
# hadolint ignore=DL3008
RUN case "$DEVICE" in \
      cpu) pip install --no-deps --index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt torch ;; \
      gpu) apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* && \
           pip install --constraint constraints.txt torch ;; \
      *) echo "DEVICE=$DEVICE: give cpu or gpu" >&2; exit 1 ;; \
    esac

# Dependencies, of a package without code: they change with pyproject.toml, the code at every commit.
COPY pyproject.toml README.md LICENSE ./
RUN mkdir -p src/search_e1 && touch src/search_e1/__init__.py && pip install --constraint constraints.txt ".[$EXTRAS]"
COPY src src
RUN pip install --no-deps --force-reinstall . && search-e1 --version

# Runs, model caches and compiled kernels live in the mounted directory, whatever the user id.
RUN useradd --uid 1000 --home-dir /data --create-home agent
USER 1000
ENV HOME=/data USER=agent
WORKDIR /data
ENTRYPOINT ["search-e1"]
CMD ["--help"]

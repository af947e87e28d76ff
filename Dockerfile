# Runs a repair in a container:
#
#   docker build --build-arg JAX_EXTRA=cuda12 -t sinder .
#   docker run --init --gpus=all --stop-timeout=120 -v /data:/data sinder \
#       --config=giant.py --workdir=/data/runs/giant \
#       --config.checkpoint=/data/giant --config.data=/data/imagenet/train
#
# User 1000 must be able to write to the workdir; otherwise add --user "$(id -u):$(id -g)".
# To run another program: --entrypoint=python sinder -m experiments.status /data/runs/giant
FROM python:3.11-slim

# cpu, cuda12, cuda13 or tpu.
ARG JAX_EXTRA=cpu
# Additional packages, e.g. "gcsfs tensorboardX".
ARG PACKAGES=""

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/sinder
COPY . .
RUN case "$JAX_EXTRA" in \
      cpu) extra="" ;; \
      cuda12|cuda13|tpu) extra="[$JAX_EXTRA]" ;; \
      *) echo "got JAX_EXTRA=$JAX_EXTRA, expected cpu, cuda12, cuda13 or tpu" >&2; exit 2 ;; \
    esac && \
    pip install --no-cache-dir -c constraints.txt -e ".$extra" $PACKAGES

RUN useradd --create-home --uid 1000 sinder
USER sinder
# A user given by --user has no home directory.
ENV HOME=/tmp

# Exec form: Python itself receives the SIGTERM of `docker stop`.
ENTRYPOINT ["python", "-m", "experiments.repair"]
CMD ["--help"]

# A repair in a container:
#
#   docker build --build-arg JAX_EXTRA=cuda12 -t sinder .
#   docker run --init --gpus=all --stop-timeout=120 -v /data:/data sinder \
#       --config=giant.py --workdir=/data/runs/giant \
#       --config.checkpoint=/data/giant --config.data=/data/imagenet/train
#
# The workdir must be writable for the user 1000, or add --user "$(id -u):$(id -g)".
# Other programs: --entrypoint=python, then e.g. -m experiments.status /data/runs/giant.
FROM python:3.11-slim

# cpu, cuda12, cuda13 or tpu.
ARG JAX_EXTRA=cpu
# More packages, such as "gcsfs tensorboardX".
ARG PACKAGES=""

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /opt/sinder
COPY . .
RUN case "$JAX_EXTRA" in \
      cpu) extra="" ;; \
      cuda12|cuda13|tpu) extra="[$JAX_EXTRA]" ;; \
      *) echo "JAX_EXTRA=$JAX_EXTRA must be cpu, cuda12, cuda13 or tpu" >&2; exit 2 ;; \
    esac && \
    pip install --no-cache-dir -c constraints.txt -e ".$extra" $PACKAGES

RUN useradd --create-home --uid 1000 sinder
USER sinder
# Any user may be given, without a home of its own.
ENV HOME=/tmp

# Exec form: SIGTERM of `docker stop` reaches Python itself.
ENTRYPOINT ["python", "-m", "experiments.repair"]
CMD ["--help"]

# syntax=docker/dockerfile:1
# Two images: `api` (the API, and the keeper where vLLM runs elsewhere) and `worker-gpu` (torch as well; it also runs on a CPU).
#   docker build --target api -t hone-api .
#   docker build --target worker-gpu -t hone-worker-gpu .
# A mirror or an index of torch's CPU builds comes with a pip.conf: --secret id=pip_conf,src=pip.conf

ARG PYTHON=3.11.13-slim-bookworm

FROM python:${PYTHON} AS api-build
# Versions that every check passed with; `--build-arg CONSTRAINTS=/dev/null` takes the newest that fit.
ARG CONSTRAINTS=constraints-ci.txt
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints-ci.txt ./
COPY app app
COPY workers workers
COPY migrations migrations
# The environment has no pip of its own: the image's serves while it is built.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    python -m venv --without-pip /opt/hone \
    && pip --python /opt/hone/bin/python install -c "${CONSTRAINTS}" '.[postgres,celery,s3]'

FROM api-build AS worker-build
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip --python /opt/hone/bin/python install -c "${CONSTRAINTS}" '.[postgres,celery,s3,train]'

# What both images are made on: no compiler, no source tree, no root.
FROM python:${PYTHON} AS runtime
# Any uid works as long as its group is 0, as OpenShift and `user:` give it: everything writable belongs to that group.
# USER and LOGNAME stand in for the name that such a uid lacks: torch asks for it.
ENV PATH=/opt/hone/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=hone \
    LOGNAME=hone \
    HONE_DATA_DIR=/var/lib/hone \
    HONE_LOG_FORMAT=json
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin hone \
    && install -d -o 10001 -g 0 -m 2770 /var/lib/hone
WORKDIR /var/lib/hone
VOLUME /var/lib/hone
USER 10001:0
STOPSIGNAL SIGTERM

FROM runtime AS worker-gpu
# What NVIDIA's container runtime lets in; the wheels of torch bring CUDA's libraries.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=worker-build /opt/hone /opt/hone
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 CMD ["python", "-m", "app.cli.alive", "runner"]
CMD ["hone", "worker"]

FROM runtime AS api
ENV HONE_HOST=0.0.0.0
COPY --from=api-build /opt/hone /opt/hone
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 CMD ["python", "-m", "app.cli.alive", "api"]
CMD ["hone", "api"]

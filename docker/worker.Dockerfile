# Worker and trainer: torch with the CUDA libraries that its wheel brings.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HONE_HOME=/var/lib/hone

RUN useradd --uid 10001 --create-home hone \
    && install -d -o hone -g hone -m 0700 /var/lib/hone

WORKDIR /opt/hone
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt ".[train]"
COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -rf /opt/hone/build

USER 10001
WORKDIR /var/lib/hone
HEALTHCHECK --interval=60s --timeout=20s --start-period=30s --retries=3 \
    CMD ["sh", "-c", "exec celery -A worker.celery_app inspect ping --timeout 10 -d worker@$(hostname)"]
CMD ["celery", "-A", "worker.celery_app", "worker", "-P", "threads", "-c", "1", "-Q", "jobs", "-n", "worker@%h", "-l", "INFO"]

# API, housekeeping and migrations: no torch.
ARG BASE=python:3.11.14-slim-bookworm
FROM ${BASE}

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HONE_HOME=/var/lib/hone

RUN useradd --uid 10001 --create-home hone \
    && install -d -o hone -g hone -m 0700 /var/lib/hone

WORKDIR /opt/hone
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt ".[server]"
COPY . .
RUN pip install --no-cache-dir --no-deps . && rm -rf /opt/hone/build

USER 10001
WORKDIR /var/lib/hone
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=4)"]
CMD ["python", "-m", "uvicorn", "api.app:app", "--host", "0.0.0.0", "--port", "8000", "--no-proxy-headers", "--no-server-header"]

"""docker-compose.yml through the real compose binary (no engine is needed to resolve a configuration)."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SECRETS = {"HONE_POSTGRES_PASSWORD": "pg-secret", "HONE_REDIS_PASSWORD": "redis-secret", "HONE_SECRET_KEY": "fernet-key"}
COMPOSE = Path(sys.executable).with_name("docker-compose")
HADOLINT = Path(sys.executable).with_name("hadolint")


def compose(*arguments: str, **secrets: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), **secrets}
    command = [str(COMPOSE), "--env-file", "/dev/null", "-f", str(ROOT / "docker-compose.yml"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    answer = compose("config", "--format", "json", **SECRETS)
    assert answer.returncode == 0, answer.stderr
    found: dict[str, Any] = json.loads(answer.stdout)["services"]
    return found


@pytest.mark.parametrize("missing", sorted(SECRETS))
@pytest.mark.parametrize("value", [None, ""])
def test_missing_or_empty_secret_is_refused_by_name(missing: str, value: str | None) -> None:
    secrets = {name: secret for name, secret in SECRETS.items() if name != missing}
    answer = compose("config", "-q", **secrets, **({} if value is None else {missing: value}))
    assert answer.returncode != 0
    assert missing in answer.stderr


def test_no_secret_stands_in_the_files() -> None:
    for line in (ROOT / "docker/env.example").read_text().splitlines():
        assert line.startswith("#") or line.endswith("="), line


def test_every_part_of_the_platform_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {"postgres", "redis", "migrate", "api", "sweep", "worker"}


def test_only_the_api_is_published_and_only_on_loopback(services: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in services.items() if service.get("ports")}
    assert list(published) == ["api"]
    assert [port["host_ip"] for port in published["api"]] == ["127.0.0.1"]


def test_only_the_worker_gets_the_image_with_torch_and_a_gpu(services: dict[str, Any]) -> None:
    files = {name: service["build"]["dockerfile"] for name, service in services.items() if "build" in service}
    assert {name for name, file in files.items() if file == "docker/worker.Dockerfile"} == {"worker"}
    devices = services["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert devices[0]["capabilities"] == ["gpu"]
    assert '".[server]"' in (ROOT / "docker/server.Dockerfile").read_text()


def test_api_workers_and_sweep_wait_for_the_migrations(services: dict[str, Any]) -> None:
    for name in ("api", "sweep", "worker"):
        assert services[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"
    assert services["migrate"]["restart"] == "no"


def test_no_secret_is_on_a_command_line(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert not any(secret in json.dumps(service.get("command")) for secret in SECRETS.values()), name


@pytest.mark.parametrize("name", ["server", "worker"])
def test_images_are_pinned_not_root_and_have_a_health_check(name: str) -> None:
    path = ROOT / f"docker/{name}.Dockerfile"
    lines = path.read_text().splitlines()
    assert any(line.startswith("ARG BASE=python:3.11.") for line in lines)
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users
    assert users[-1].isdigit()
    assert users[-1] != "0"
    assert any(line.startswith("HEALTHCHECK") for line in lines)
    done = subprocess.run([str(HADOLINT), str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout

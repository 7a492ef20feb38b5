from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.app import create_app
from database.session import open_database
from tests.api.platform import Account, Platform, make_settings


@pytest.fixture(scope="session", params=["sqlite", "postgresql"])
def platform(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One API for all tests of this room, over a database that no other room empties; each test has projects of its own."""
    url = "" if request.param == "sqlite" else own_database(request.getfixturevalue("postgres_url"))
    broker = SecretStr(request.getfixturevalue("valkey_url"))
    settings = make_settings(tmp_path_factory.mktemp("home"), database_url=url, broker_url=broker)
    database = open_database(settings)
    with TestClient(create_app(settings), raise_server_exceptions=False) as http:
        platform = Platform(settings, database, http)
        platform.register_base_model()
        yield platform
    database.close()


def own_database(url: str) -> str:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
        connection.execute("CREATE DATABASE api_tests")
    return url.removesuffix("/postgres") + "/api_tests"


@pytest.fixture
def small_uploads(platform: Platform) -> Iterator[int]:
    """The largest upload of one test, in bytes."""
    state = platform.http.app.state
    services, limit = state.services, 100_000
    state.services = replace(services, settings=platform.settings.model_copy(update={"max_upload_bytes": limit}))
    yield limit
    state.services = services


@pytest.fixture
def owner(platform: Platform) -> Account:
    return platform.account()


@pytest.fixture
def stranger(platform: Platform) -> Account:
    return platform.account()

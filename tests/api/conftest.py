from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from database.session import open_database
from tests.api.platform import Account, Platform, make_settings


@pytest.fixture(scope="session")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """One API for all tests of this room; each test has projects of its own."""
    settings = make_settings(tmp_path_factory.mktemp("home"))
    database = open_database(settings)
    with TestClient(create_app(settings), raise_server_exceptions=False) as http:
        platform = Platform(settings, database, http)
        platform.register_base_model()
        yield platform
    database.close()


@pytest.fixture
def owner(platform: Platform) -> Account:
    return platform.account()


@pytest.fixture
def stranger(platform: Platform) -> Account:
    return platform.account()

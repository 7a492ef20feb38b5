"""API keys: shown once, limited to their scopes, ended by revoking."""

from typing import Any

import pytest

from database.models import ApiKey
from tests.api.platform import Account, Platform, assert_error

KEYS = "/v1/admin/api_keys"


def test_key_is_shown_once_and_opens_its_scopes_only(owner: Account, platform: Platform) -> None:
    created = owner.post(KEYS, {"name": "ci", "scopes": ["models:read", "models:read"]}).json()
    clear = created.pop("key")
    assert clear.startswith("hone-")
    assert (created["name"], created["scopes"], created["project_id"]) == ("ci", ["models:read"], owner.project_id)
    listed = owner.get(KEYS)
    assert created in listed.json()["data"]
    assert clear not in listed.text
    with platform.database.reading() as session:
        row = session.get(ApiKey, created["id"])
    assert row is not None
    assert clear not in str({column.name: getattr(row, column.name) for column in ApiKey.__table__.columns})
    limited = Account(owner.project_id, clear, owner.http)
    assert limited.get("/v1/models").status_code == 200
    assert_error(limited.get("/v1/files"), 403, "insufficient_scope")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"name": "k", "scopes": []}, "invalid_value", "scopes"),
        ({"name": "k", "scopes": ["jobs:wirte"]}, "invalid_value", "scopes.0"),
        ({"name": "", "scopes": ["admin"]}, "invalid_value", "name"),
        ({"name": "k"}, "missing_required_parameter", "scopes"),
        ({"name": "k", "scopes": ["admin"], "scope": "x"}, "unknown_parameter", "scope"),
    ],
)
def test_refused_key_names_its_field(body: dict[str, Any], code: str, param: str, owner: Account, platform: Platform) -> None:
    before = platform.count_rows()
    assert_error(owner.post(KEYS, body), 400, code, param)
    assert platform.count_rows() == before


def test_revoking_twice_is_404(owner: Account) -> None:
    key_id = owner.post(KEYS, {"name": "k", "scopes": ["jobs:read"]}).json()["id"]
    assert owner.delete(f"{KEYS}/{key_id}").status_code == 200
    assert_error(owner.delete(f"{KEYS}/{key_id}"), 404, "not_found", "id")

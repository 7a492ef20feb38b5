import hashlib

import pytest
from sqlalchemy import text, update

from core.errors import NotFound
from database.models import ApiKey
from database.projects import create_api_key, ensure_first_admin, find_api_key, list_api_keys, revoke_api_key
from tests.database.rows import make_project


def test_the_first_admin_is_made_once(database):
    with database.transaction() as session:
        clear = ensure_first_admin(session)
    with database.transaction() as session:
        assert ensure_first_admin(session) is None
        assert "admin" in find_api_key(session, clear).scopes


def test_a_key_is_found_by_its_clear_text_and_stored_as_sha256(database):
    with database.transaction() as session:
        key, clear = create_api_key(session, make_project(session), "ci", ["jobs:read"])
    with database.reading() as session:
        assert find_api_key(session, clear).id == key.id
        assert find_api_key(session, clear[:-1]) is None
        assert find_api_key(session, clear + "\x00") is None
        rows = session.execute(text("SELECT * FROM api_keys")).mappings().all()
    assert clear.startswith("hone-")
    assert rows[0]["key_hash"] == hashlib.sha256(clear.encode()).hexdigest()
    assert clear not in str(rows)


def test_revoked_and_expired_keys_open_nothing(database):
    with database.transaction() as session:
        project = make_project(session)
        revoked, first = create_api_key(session, project, "a", [])
        expired, second = create_api_key(session, project, "b", [], expires_at=10.0)
        revoke_api_key(session, project, revoked.id)
        assert find_api_key(session, first) is None
        assert find_api_key(session, second) is None
        session.execute(update(ApiKey).where(ApiKey.id == expired.id).values(expires_at=4e9))
        assert find_api_key(session, second) is not None


def test_a_project_cannot_revoke_or_list_the_keys_of_another(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        key, clear = create_api_key(session, mine, "a", [])
        with pytest.raises(NotFound):
            revoke_api_key(session, other, key.id)
        assert find_api_key(session, clear) is not None
        assert list_api_keys(session, other) == []
        assert [row.id for row in list_api_keys(session, mine)] == [key.id]

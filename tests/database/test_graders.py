import json
import time

import pytest
from cryptography.fernet import Fernet

from core.errors import InvalidRequest, NotFound, StorageError
from core.grader_specs import EndpointOptions, PinnedEndpointGrader
from database.graders import (
    MASK,
    add_grader_version,
    create_grader,
    delete_grader,
    get_grader,
    grader_view,
    list_graders,
    pin_grader,
    read_secrets,
    rotate_signing_secret,
)
from database.secrets import Secrets
from tests.database.rows import make_project

HEADERS = {"Authorization": "Bearer sesame-open", "X-Team": "blue"}
OPTIONS = EndpointOptions(url="https://grader.example/grade", reward_range=(0.0, 1.0), timeout_seconds=5.0)


@pytest.fixture
def secrets():
    return Secrets(Fernet.generate_key().decode())


def create(session, secrets, project, name="judge"):
    return create_grader(session, secrets, project, name=name, options=OPTIONS, headers=HEADERS)


def test_secrets_are_nowhere_in_the_database_in_clear(settings, database, secrets):
    with database.transaction() as session:
        signing_secret = create(session, secrets, make_project(session))[2]
    with database.reading() as session:
        if session.get_bind().dialect.name == "sqlite":
            raw = b"".join(path.read_bytes() for path in settings.home.glob("hone.db*"))
        else:
            raw = session.connection().exec_driver_sql("SELECT string_agg(v::text, ' ') FROM grader_versions v").scalar_one().encode()
    assert b"grader.example" in raw
    for clear in (b"sesame-open", b"blue", signing_secret.encode(), signing_secret.removeprefix("whsec_").encode()):
        assert clear not in raw


def test_the_view_shows_header_names_and_no_value(database, secrets):
    with database.transaction() as session:
        grader, version, signing_secret = create(session, secrets, make_project(session))
    view = grader_view(grader, version)
    assert view["headers"] == {"Authorization": MASK, "X-Team": MASK}
    assert view["reward_range"] == [0.0, 1.0]
    assert signing_secret not in json.dumps(view)
    assert "sesame-open" not in json.dumps(view)


def test_a_pinned_version_keeps_its_options_and_secrets_when_the_grader_changes_and_is_deleted(database, secrets):
    with database.transaction() as session:
        project = make_project(session)
        grader, _, signing_secret = create(session, secrets, project)
        pinned = pin_grader(session, project, grader.id)
        changed = EndpointOptions(url="https://other.example/g")
        add_grader_version(session, secrets, project, grader.id, name="new name", options=changed, headers={"A": "b"})
        newer = pin_grader(session, project, grader.id)
        delete_grader(session, project, grader.id)
        old_secrets, new_secrets = (read_secrets(session, secrets, pin.secret_ref) for pin in (pinned, newer))
    assert pinned == PinnedEndpointGrader(
        type="endpoint", name="judge", secret_ref=f"{grader.id}@1", grader_version=f"{grader.id}@1", **OPTIONS.model_dump()
    )
    assert (newer.secret_ref, newer.url, newer.name) == (f"{grader.id}@2", "https://other.example/g", "new name")
    assert old_secrets == {"headers": HEADERS, "signing_secret": signing_secret}
    assert new_secrets == {"headers": {"A": "b"}, "signing_secret": signing_secret}


def test_headers_stay_when_an_update_names_none(database, secrets):
    with database.transaction() as session:
        project = make_project(session)
        grader = create(session, secrets, project)[0]
        _, version = add_grader_version(session, secrets, project, grader.id, options=OPTIONS)
        assert read_secrets(session, secrets, f"{grader.id}@2")["headers"] == HEADERS
    assert version.header_names == ["Authorization", "X-Team"]


def test_a_rotation_reaches_every_version_and_keeps_the_secret_before_for_a_day(database, secrets):
    with database.transaction() as session:
        project = make_project(session)
        grader, _, first = create(session, secrets, project)
        add_grader_version(session, secrets, project, grader.id, options=OPTIONS, headers={"A": "b"})
        _, version, second, expires_at = rotate_signing_secret(session, secrets, project, grader.id)
    assert version.version == 2
    assert expires_at == pytest.approx(time.time() + 24 * 3600, abs=60)
    rotated = {"signing_secret": second, "previous_signing_secret": first, "previous_expires_at": expires_at}
    with database.transaction() as session:
        assert read_secrets(session, secrets, f"{grader.id}@1") == {"headers": HEADERS, **rotated}
        assert read_secrets(session, secrets, f"{grader.id}@2") == {"headers": {"A": "b"}, **rotated}
        add_grader_version(session, secrets, project, grader.id, options=OPTIONS)
        assert read_secrets(session, secrets, f"{grader.id}@3") == {"headers": {"A": "b"}, **rotated}
        third = rotate_signing_secret(session, secrets, project, grader.id)[2]
        found = read_secrets(session, secrets, f"{grader.id}@1")
    assert (found["signing_secret"], found["previous_signing_secret"]) == (third, second)


def test_a_grader_of_another_project_or_a_deleted_one_is_not_found(database, secrets):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        grader = create(session, secrets, mine)[0]
        calls = [
            lambda project: get_grader(session, project, grader.id),
            lambda project: pin_grader(session, project, grader.id),
            lambda project: delete_grader(session, project, grader.id),
            lambda project: add_grader_version(session, secrets, project, grader.id, options=OPTIONS),
            lambda project: rotate_signing_secret(session, secrets, project, grader.id),
        ]
        for call in calls:
            with pytest.raises(NotFound) as caught:
                call(other)
            assert caught.value.param == "grader_id"
        delete_grader(session, mine, grader.id)
        for call in calls:
            with pytest.raises(NotFound):
                call(mine)


def test_secrets_of_an_unknown_reference_or_another_key_are_refused(database, secrets):
    with database.transaction() as session:
        grader = create(session, secrets, make_project(session))[0]
        for reference in ("inline", f"{grader.id}@2", f"{grader.id}@x", "@"):
            with pytest.raises(NotFound):
                read_secrets(session, secrets, reference)
        with pytest.raises(StorageError):
            read_secrets(session, Secrets(Fernet.generate_key().decode()), f"{grader.id}@1")


def test_the_list_is_newest_first_and_the_projects_own(database, secrets):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        for name in ("a", "b", "c"):
            create(session, secrets, mine, name)
        create(session, secrets, other, "foreign")
        first = list_graders(session, mine, after=None, limit=2)
        rest = list_graders(session, mine, after=first.items[-1][0].id, limit=2)
        with pytest.raises(InvalidRequest):
            list_graders(session, mine, after="grader_no", limit=2)
    assert [grader.name for grader, _ in first.items + rest.items] == ["c", "b", "a"]
    assert (first.has_more, rest.has_more) == (True, False)

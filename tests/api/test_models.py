"""Base models are everybody's and an admin's to change; fine-tuned ones are the project's own."""

from typing import Any

import pytest

from database.base_models import get_model
from database.models import Model
from tests.api.platform import BASE_MODEL, Account, Platform, assert_error

FOLDER = {"type": "folder", "path": "/models/x"}
COMMIT = "c1899de289a04d12100db370d81485cdf75e47ca"


@pytest.mark.parametrize(
    "source",
    [FOLDER, {"type": "gguf", "path": "/models/x.gguf"}, {"type": "hub", "repo": "Qwen/Qwen3-0.6B", "revision": COMMIT}],
)
def test_base_model_is_registered_for_every_project(source: dict[str, str], owner: Account, stranger: Account, platform: Platform) -> None:
    name = f"Org/base-{owner.project_id}-{source['type']}"
    created = owner.post("/v1/models", {"name": name, "source": source, "digest": "a" * 64}).json()
    assert (created["id"], created["object"], created["owned_by"], created["kind"]) == (name, "model", "system", "base")
    for path in (f"/v1/models/{name}", f"/v1/models/{name.replace('/', '%2F')}"):
        assert stranger.get(path).json() == created
    with platform.database.reading() as session:
        row = get_model(session, stranger.project_id, name)
    assert (row.source, row.digest, row.project_id) == (source, "a" * 64, None)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"name": BASE_MODEL, "source": FOLDER}, "model_exists", "name"),
        ({"name": "../x", "source": FOLDER}, "invalid_value", "name"),
        ({"name": "x", "source": {"type": "folder", "path": "relative"}}, "invalid_value", "source.path"),
        ({"name": "x", "source": {"type": "gguf", "path": "/x.bin"}}, "invalid_value", "source.path"),
        ({"name": "x", "source": {"type": "hub", "repo": "a/b", "revision": "main"}}, "invalid_value", "source.revision"),
        ({"name": "x", "source": {"type": "hub", "repo": "a/b"}}, "missing_required_parameter", "source.revision"),
        ({"name": "x", "source": {"type": "torrent"}}, "invalid_value", "source"),
        ({"name": "x"}, "missing_required_parameter", "source"),
        ({"name": "x", "source": FOLDER, "digset": ""}, "unknown_parameter", "digset"),
        ({"name": "x", "source": FOLDER, "digest": "abc"}, "invalid_value", "digest"),
    ],
)
def test_refused_model_names_its_field_and_writes_nothing(
    body: dict[str, Any], code: str, param: str, owner: Account, platform: Platform
) -> None:
    before = platform.count_rows()
    assert_error(owner.post("/v1/models", body), 400, code, param)
    assert platform.count_rows() == before


def test_unknown_model_has_the_contracts_shape(owner: Account) -> None:
    assert_error(owner.get("/v1/models/ft:nothing:org::x"), 404, "model_not_found", "model")


def test_own_model_is_deleted_by_its_project_and_a_base_model_only_by_an_admin(owner: Account, platform: Platform) -> None:
    name = platform.fine_tuned_model(owner)
    writer = platform.account(("jobs:write", "models:read"), owner.project_id)
    assert writer.get(f"/v1/models/{name}").json()["owned_by"] == platform.settings.organization_id
    assert writer.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    assert_error(writer.get(f"/v1/models/{name}"), 404, "model_not_found", "model")
    base = f"base-{owner.project_id}"
    owner.post("/v1/models", {"name": base, "source": FOLDER})
    assert_error(writer.delete(f"/v1/models/{base}"), 403, "permission_denied", "model")
    assert owner.delete(f"/v1/models/{base}").status_code == 200


def test_list_has_what_the_sdk_reads(owner: Account, platform: Platform) -> None:
    name = platform.fine_tuned_model(owner)
    page = owner.get("/v1/models").json()
    assert page["object"] == "list"
    assert page["data"][0]["id"] == name
    assert {"id", "created", "object", "owned_by"} <= page["data"][0].keys()
    with platform.database.reading() as session:
        assert session.query(Model).filter(Model.project_id == owner.project_id).count() == 1

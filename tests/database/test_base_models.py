import pytest

from core.errors import Conflict, NotFound
from database.base_models import delete_model, get_model, list_models, register_model
from tests.database.rows import make_project

SOURCE = {"type": "folder", "path": "/models/tiny"}


def register(session, name, project_id=None, digest="d1"):
    return register_model(session, name=name, project_id=project_id, kind="base", source=SOURCE, digest=digest)


def test_a_shared_model_is_seen_by_all_and_a_projects_own_by_it_alone(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        register(session, "shared")
        register(session, "own", mine)
        assert {model.name for model in list_models(session, mine)} == {"shared", "own"}
        assert [model.name for model in list_models(session, other)] == ["shared"]
        with pytest.raises(NotFound) as caught:
            get_model(session, other, "own")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_name_is_taken_once_per_owner_until_its_model_is_deleted(database):
    with database.transaction() as session:
        project = make_project(session)
        register(session, "tiny", digest="shared")
        register(session, "tiny", project, digest="own")
        for owner in (None, project):
            with pytest.raises(Conflict, match="already a model"):
                register(session, "tiny", owner)
        assert get_model(session, project, "tiny").digest == "own"
        delete_model(session, project, "tiny")
        assert get_model(session, project, "tiny").digest == "shared"
        register(session, "tiny", project, digest="new")
        assert get_model(session, project, "tiny").digest == "new"


def test_a_project_cannot_delete_a_shared_model_or_anothers(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        register(session, "shared")
        register(session, "own", mine)
        for name in ("shared", "own"):
            with pytest.raises(NotFound):
                delete_model(session, other, name)
        delete_model(session, None, "shared")
        assert [model.name for model in list_models(session, mine)] == ["own"]

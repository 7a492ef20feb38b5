import pytest
from sqlalchemy import update

from core.errors import InvalidRequest, NotFound
from database.blobs import BlobInfo
from database.files import delete_file, get_file, insert_file, list_files
from database.models import File
from tests.database.rows import make_project

BLOB = BlobInfo("blob_x", 3, "0" * 64)


def insert(session, project, name="a.jsonl", purpose="fine-tune", **options):
    return insert_file(session, project, filename=name, purpose=purpose, blob=BLOB, **options).id


def names(page):
    return [file.filename for file in page.items]


def test_pages_run_newest_first_or_oldest_first_without_gap_or_repeat(database):
    with database.transaction() as session:
        project = make_project(session)
        for number in range(7):
            insert(session, project, str(number))
    for order, expected in (("desc", "6543210"), ("asc", "0123456")):
        seen, after = "", None
        with database.reading() as session:
            while True:
                page = list_files(session, project, purpose=None, after=after, limit=3, order=order)
                seen += "".join(names(page))
                if not page.has_more:
                    break
                after = page.items[-1].id
        assert seen == expected


def test_same_time_of_creation_still_pages_completely(database):
    with database.transaction() as session:
        project = make_project(session)
        made = {insert(session, project) for _ in range(5)}
        session.execute(update(File).values(created_at=5.0))
        first = list_files(session, project, purpose=None, after=None, limit=2)
        second = list_files(session, project, purpose=None, after=first.items[-1].id, limit=3)
    assert {file.id for file in first.items + second.items} == made


def test_unknown_after_names_the_parameter(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        foreign = insert(session, other)
        for after in ("file-no", foreign, "a\x00"):
            with pytest.raises(InvalidRequest) as caught:
                list_files(session, mine, purpose=None, after=after, limit=2)
            assert caught.value.param == "after"


def test_purpose_filters_the_list(database):
    with database.transaction() as session:
        project = make_project(session)
        insert(session, project, "train")
        insert(session, project, "other", purpose="evals")
        assert names(list_files(session, project, purpose="evals", after=None, limit=9)) == ["other"]


def test_deleted_expired_and_foreign_files_are_not_found_but_keep_their_row(database):
    with database.transaction() as session:
        mine, other = make_project(session), make_project(session)
        deleted, expired, kept = insert(session, mine), insert(session, mine, expires_at=10.0), insert(session, mine)
        delete_file(session, mine, deleted)
        for project, file_id in ((mine, deleted), (mine, expired), (other, kept)):
            with pytest.raises(NotFound) as caught:
                get_file(session, project, file_id)
            assert caught.value.param == "id"
        with pytest.raises(NotFound):
            delete_file(session, other, kept)
        with pytest.raises(NotFound):
            delete_file(session, mine, deleted)
        assert [file.id for file in list_files(session, mine, purpose=None, after=None, limit=9).items] == [kept]
        assert session.get(File, deleted).blob == BLOB.id

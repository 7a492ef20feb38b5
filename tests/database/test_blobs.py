import hashlib
import os
import random
import tracemalloc

import boto3
import pytest
from moto.server import ThreadedMotoServer
from sqlalchemy import func, select, text, update

from core.errors import StorageError
from core.settings import Settings
from database.blobs import CHUNK_BYTES, BlobInfo, BlobStore
from database.files import delete_file, insert_file
from database.jobs import cancel_job, insert_job
from database.models import BlobChunk, BlobChunkRef, BlobGarbage, BlobManifest, File
from database.session import open_database, reading, writing
from tests.database.rows import in_threads, make_project, new_job


@pytest.fixture(scope="module")
def bucket():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    credentials = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=endpoint, **credentials).create_bucket(Bucket="hone")
    yield endpoint
    server.stop()


PLACES = [("sqlite", "rows"), ("postgresql", "rows"), ("sqlite", "folder"), ("sqlite", "s3")]
every_place = pytest.mark.parametrize(("settings", "place"), PLACES, indirect=True)


@pytest.fixture
def place(request, settings, monkeypatch):
    """Settings for one place of chunk bytes. The object stores are tried beside SQLite only: their rows are the same."""
    if request.param == "rows":
        return settings
    if request.param == "folder":
        return settings.model_copy(update={"blob_url": f"file://{settings.home}/chunks"})
    variables = {"AWS_ENDPOINT": request.getfixturevalue("bucket"), "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    for name, value in {**variables, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}.items():
        monkeypatch.setenv(name, value)
    return settings.model_copy(update={"blob_url": f"s3://hone/{request.node.name}"})


@pytest.fixture
def store(database, place):
    return BlobStore(database, place)


@pytest.fixture
def rows_store(database, settings):
    return BlobStore(database, settings)


def noise(size, seed=0):
    return random.Random(seed).randbytes(size)


def count(database, table):
    with reading(database.blob_engine) as session:
        return session.execute(select(func.count()).select_from(table)).scalar_one()


@every_place
def test_bytes_come_back_as_they_went_in_whatever_the_size_of_the_pieces(store):
    content = noise(2 * CHUNK_BYTES + 17)
    pieces = [content[start : start + 300_001] for start in range(0, len(content), 300_001)]
    info = store.put(iter(pieces), kind="file")
    assert (info.bytes, info.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    got = list(store.read(info.id))
    assert [len(chunk) for chunk in got] == [CHUNK_BYTES, CHUNK_BYTES, 17]
    assert b"".join(got) == content


def test_nothing_and_exactly_one_chunk_are_stored_too(rows_store):
    for content in (b"", noise(CHUNK_BYTES)):
        info = rows_store.put([content], kind="file")
        assert b"".join(rows_store.read(info.id)) == content


@every_place
def test_equal_chunks_are_stored_once(store, database):
    content = noise(CHUNK_BYTES)
    store.put([content, content, b"end"], kind="file")
    store.put([content, b"end"], kind="checkpoint")
    store.put([b"end"], kind="file")
    assert count(database, BlobChunk) == 2
    assert count(database, BlobChunkRef) == 6
    assert count(database, BlobGarbage) == 0


@every_place
def test_equal_content_put_at_the_same_time_is_stored_once_and_read_by_all(store, database):
    content = noise(CHUNK_BYTES + 5)
    infos = in_threads([lambda: store.put([content], kind="file")] * 4)
    assert len({info.id for info in infos}) == 4
    assert all(b"".join(store.read(info.id)) == content for info in infos)
    assert count(database, BlobChunk) == 2


def test_streaming_in_and_out_holds_few_chunks_in_memory(rows_store):
    def pieces():
        for number in range(24):
            yield noise(CHUNK_BYTES, number)

    tracemalloc.start()
    info = rows_store.put(pieces(), kind="file")
    total = sum(len(chunk) for chunk in rows_store.read(info.id))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 24 * CHUNK_BYTES
    assert peak < 10 * CHUNK_BYTES


def test_a_damaged_chunk_is_named_and_what_came_before_it_is_given(rows_store, database):
    content = noise(3 * CHUNK_BYTES)
    info = rows_store.put([content], kind="file")
    digest = hashlib.sha256(content[CHUNK_BYTES : 2 * CHUNK_BYTES]).hexdigest()
    with writing(database.blob_engine) as session:
        session.execute(update(BlobChunk).where(BlobChunk.digest == digest).values(data=b"x" * CHUNK_BYTES))
    reader = rows_store.read(info.id)
    assert next(reader) == content[:CHUNK_BYTES]
    with pytest.raises(StorageError, match=f"{info.id}: chunk 1 .{digest[:12]}. is damaged") as caught:
        next(reader)
    assert not caught.value.retryable


def test_a_chunk_lost_from_the_folder_is_named(settings, database):
    store = BlobStore(database, settings.model_copy(update={"blob_url": f"file://{settings.home}/chunks"}))
    info = store.put([noise(10)], kind="file")
    for folder, _, names in os.walk(settings.home / "chunks"):
        for name in names:
            os.unlink(os.path.join(folder, name))
    with pytest.raises(StorageError, match="has no chunk"):
        list(store.read(info.id))


def test_an_unknown_or_deleted_blob_is_an_error_not_nothing(rows_store):
    info = rows_store.put([b"abc"], kind="file")
    rows_store.delete(info.id)
    for blob_id in (info.id, "blob_no"):
        with pytest.raises(StorageError, match="no blob"):
            next(rows_store.read(blob_id))


@every_place
def test_an_upload_that_fails_midway_leaves_nothing(store, database):
    def pieces():
        yield noise(CHUNK_BYTES)
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        store.put(pieces(), kind="file")
    assert count(database, BlobManifest) == 0
    assert store.collect() == 1
    assert count(database, BlobChunk) == 0
    assert stored_objects(store) == []


def stored_objects(store):
    if store._objects is None:
        return []
    return [entry["path"] for batch in store._objects._store.list() for entry in batch]


@every_place
def test_the_collector_frees_what_nobody_refers_to_and_nothing_else(store, database):
    shared, own = noise(CHUNK_BYTES, 1), noise(CHUNK_BYTES, 2)
    kept = store.put([shared], kind="file")
    gone = store.put([shared, own], kind="file")
    store.delete(gone.id)
    assert store.collect() == 1
    assert store.collect() == 0
    assert b"".join(store.read(kept.id)) == shared
    store.delete(kept.id)
    assert store.collect() == 1
    assert stored_objects(store) == []
    assert count(database, BlobGarbage) == 0


@every_place
def test_an_upload_in_progress_is_safe_from_the_collector_until_it_expires(store, database):
    def pieces(is_abandoned):
        yield noise(CHUNK_BYTES, 3)
        if is_abandoned:
            with writing(database.blob_engine) as session:
                session.execute(update(BlobManifest).values(expires_at=1.0))
        assert store.collect(grace_seconds=0) == int(is_abandoned)
        yield noise(10, 4)

    info = store.put(pieces(False), kind="file")
    assert len(b"".join(store.read(info.id))) == CHUNK_BYTES + 10
    store.delete(info.id)
    store.collect()
    with pytest.raises(StorageError, match="given up"):
        store.put(pieces(True), kind="file")


def test_an_object_whose_writer_died_before_naming_it_is_removed(settings, database):
    """The state that a kill between the upload and the second transaction leaves: an object and its garbage row."""
    store = BlobStore(database, settings.model_copy(update={"blob_url": f"file://{settings.home}/chunks"}))
    with writing(database.blob_engine) as session:
        session.add(BlobGarbage(object_key="ab.1", not_before=1.0, is_claimed=False))
        session.add(BlobGarbage(object_key="ab.2", not_before=4e9, is_claimed=False))
        session.add(BlobGarbage(object_key="ab.3", not_before=4e9, is_claimed=True))
    for key in ("ab.1", "ab.2", "ab.3"):
        store._objects.put(key, b"x")
    store.collect()
    assert stored_objects(store) == ["ab/ab.2"]


def test_an_object_that_the_collector_has_claimed_is_not_named_any_more(settings, database, monkeypatch):
    """A writer so slow that the collector takes its object for a stray one, between its two transactions."""
    store = BlobStore(database, settings.model_copy(update={"blob_url": f"file://{settings.home}/chunks"}))
    put = store._objects.put

    def put_slowly(key, data):
        put(key, data)
        with writing(database.blob_engine) as session:
            session.execute(update(BlobGarbage).values(is_claimed=True))

    monkeypatch.setattr(store._objects, "put", put_slowly)
    with pytest.raises(StorageError, match="took too long"):
        store.put([noise(10)], kind="file")
    store.collect()
    assert (count(database, BlobChunk), stored_objects(store)) == (0, [])


def test_collecting_while_others_put_and_delete_loses_no_byte(rows_store):
    contents = [noise(2000, seed) for seed in range(3)]

    def put_and_delete():
        for number in range(12):
            content = contents[number % 3]
            info = rows_store.put([content], kind="file")
            assert b"".join(rows_store.read(info.id)) == content
            rows_store.delete(info.id)

    def collect():
        return sum(rows_store.collect() for _ in range(25))

    in_threads([put_and_delete, put_and_delete, collect])
    rows_store.collect()
    assert count(rows_store._database, BlobChunk) == 0


def test_a_blob_is_dropped_only_when_no_row_names_it_and_the_grace_is_over(rows_store, database):
    def put(seed):
        return rows_store.put([noise(100, seed)], kind="file")

    def alive():
        rows_store.collect(grace_seconds=3600)
        with reading(database.blob_engine) as session:
            return set(session.execute(select(BlobManifest.id)).scalars())

    uploaded, pinned, orphan, fresh = (put(seed) for seed in range(4))
    with database.transaction() as session:
        project = make_project(session)
        file_id = insert_file(session, project, filename="f", purpose="fine-tune", blob=uploaded).id
        job_id = insert_job(session, new_job(project, training_blob=pinned.id)).id
    with writing(database.blob_engine) as session:
        session.execute(update(BlobManifest).where(BlobManifest.id != fresh.id).values(created_at=5.0))
    assert alive() == {uploaded.id, pinned.id, fresh.id}
    assert orphan.id not in alive()
    with database.transaction() as session:
        delete_file(session, project, file_id)
    assert uploaded.id in alive()
    with database.transaction() as session:
        session.execute(update(File).values(deleted_at=5.0))
        cancel_job(session, project, job_id)
    assert alive() == {fresh.id}


def test_one_write_lock_does_not_hold_the_other(tmp_path, sqlite_template):
    """An open transaction of the main database leaves uploads alone, and the other way round."""
    for name in ("hone.db", "blobs.db"):
        (tmp_path / name).write_bytes((sqlite_template / name).read_bytes())
    settings = Settings(home=tmp_path)
    database = open_database(settings)
    store = BlobStore(database, settings)
    with database.transaction() as session:
        make_project(session)
        info = store.put([b"abc"], kind="file")
    with writing(database.blob_engine) as blobs:
        blobs.execute(text("DELETE FROM blob_garbage"))
        with database.transaction() as session:
            make_project(session)
    assert info == BlobInfo(info.id, 3, hashlib.sha256(b"abc").hexdigest())
    database.close()

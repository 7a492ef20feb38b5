"""Frees what no row needs any more: abandoned uploads, blobs that nothing names, chunks without a reference, stray objects.

Every step re-checks in the transaction that deletes, so a writer at work at the same time loses nothing.
"""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, delete, exists, or_, select, update
from sqlalchemy.orm import Session

from database.models import READY, UPLOADING, BlobChunk, BlobChunkRef, BlobGarbage, BlobManifest, CheckpointFile, File, Job, ResumePointFile
from database.object_store import ObjectStore
from database.session import Database, reading, writing
from database.sql import clock, insert_row, now

BATCH = 32
GRACE_SECONDS = 86_400.0
"""How long a blob that nothing names yet (or any more) is left alone: the time between its upload and the row that names it."""


def collect(database: Database, objects: ObjectStore | None, *, grace_seconds: float = GRACE_SECONDS) -> int:
    """How many chunks were removed."""
    _drop_abandoned(database)
    _drop_unnamed(database, grace_seconds)
    removed = 0
    while batch := _remove_chunks(database):
        removed += batch
    if objects is not None:
        while key := _claim_garbage(database):
            objects.delete(key)
            with writing(database.blob_engine) as session:
                session.execute(delete(BlobGarbage).where(BlobGarbage.object_key == key))
    return removed


def _drop_abandoned(database: Database) -> None:
    with writing(database.blob_engine) as session:
        session.execute(delete(BlobManifest).where(BlobManifest.status == UPLOADING, BlobManifest.expires_at < clock()))


def _drop_unnamed(database: Database, grace_seconds: float) -> None:
    """Deletes whole blobs that no row of the main database names; those of a deleted file only after the grace period, too."""
    last = ""
    while True:
        is_old = (BlobManifest.status == READY) & (BlobManifest.created_at < clock() - grace_seconds)
        query = select(BlobManifest.id).where(is_old, BlobManifest.id > last).order_by(BlobManifest.id).limit(500)
        with reading(database.blob_engine) as session:
            candidates = list(session.execute(query).scalars())
        if not candidates:
            return
        last = candidates[-1]
        with database.reading() as session:
            unnamed = set(candidates) - _named_among(session, candidates, grace_seconds)
        with writing(database.blob_engine) as session:
            session.execute(delete(BlobManifest).where(BlobManifest.id.in_(unnamed)))


def _named_among(session: Session, blobs: Sequence[str], grace_seconds: float) -> set[str]:
    limit = now(session) - grace_seconds
    is_kept: ColumnElement[bool] = or_(File.deleted_at.is_(None), File.deleted_at > limit)
    is_kept &= or_(File.expires_at.is_(None), File.expires_at > limit)
    unfinished = Job.finished_at.is_(None)
    queries = [
        select(File.blob).where(File.blob.in_(blobs), is_kept),
        select(Job.training_blob).where(Job.training_blob.in_(blobs), unfinished),
        select(Job.validation_blob).where(Job.validation_blob.in_(blobs), unfinished),
        select(CheckpointFile.blob).where(CheckpointFile.blob.in_(blobs)),
        select(ResumePointFile.blob).where(ResumePointFile.blob.in_(blobs)),
    ]
    return {blob for query in queries for blob in session.execute(query).scalars() if blob is not None}


def _remove_chunks(database: Database) -> int:
    """Removes one batch. The rows are locked first and looked at again after: what was referred to meanwhile stays."""
    is_referred = exists(select(1).where(BlobChunkRef.digest == BlobChunk.digest))
    candidates = select(BlobChunk.digest).where(~is_referred).limit(BATCH).with_for_update(skip_locked=True)
    with writing(database.blob_engine) as session:
        digests = list(session.execute(candidates).scalars())
        statement = delete(BlobChunk).where(BlobChunk.digest.in_(digests), ~is_referred).returning(BlobChunk.object_key)
        keys = list(session.execute(statement, execution_options={"synchronize_session": False}).scalars())
        for key in keys:
            if key is not None:
                insert_row(session, BlobGarbage, object_key=key, not_before=clock(), is_claimed=False)
    return len(keys)


def _claim_garbage(database: Database) -> str | None:
    """An object that no chunk can name any more from now on."""
    due = select(BlobGarbage.object_key).where(or_(BlobGarbage.is_claimed, BlobGarbage.not_before <= clock())).limit(1)
    statement = update(BlobGarbage).where(BlobGarbage.object_key == due.scalar_subquery()).values(is_claimed=True)
    with writing(database.blob_engine) as session:
        return session.execute(
            statement.returning(BlobGarbage.object_key), execution_options={"synchronize_session": False}
        ).scalar_one_or_none()

"""Byte strings of any size as content-addressed chunks of 1 MiB: in the database, or in an object store by setting.

Never addressable by hash from outside. Nothing here holds more than two chunks in memory, and no transaction waits for a caller
or for the object store.
"""

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from core.errors import StorageError
from core.settings import Settings
from database.blob_collector import GRACE_SECONDS, collect
from database.models import READY, UPLOADING, BlobChunk, BlobChunkRef, BlobGarbage, BlobManifest
from database.object_store import ObjectStore, open_object_store
from database.session import Database, reading, writing
from database.sql import clock, insert_or_skip, insert_row, new_id, update_row

CHUNK_BYTES = 1024 * 1024
UPLOAD_TTL_SECONDS = 3600.0
"""How long a writer may stand still between two chunks before the collector takes its upload for abandoned."""


@dataclass(frozen=True)
class BlobInfo:
    id: str
    bytes: int
    sha256: str


class BlobStore:
    """Share one per process; every method opens its own short transactions."""

    def __init__(self, database: Database, settings: Settings) -> None:
        self._database = database
        self._engine = database.blob_engine
        self._objects: ObjectStore | None = open_object_store(settings.blob_url) if settings.blob_url else None

    def put(self, chunks: Iterable[bytes], *, kind: str) -> BlobInfo:
        """Stores what `chunks` (pieces of any size) yields. When `chunks` raises, nothing stays.

        Raises: StorageError when the upload was taken for abandoned or the object store fails.
        """
        blob_id = new_id("blob_")
        with writing(self._engine) as session:
            values = {"kind": kind, "status": UPLOADING, "expires_at": _expiry(), "bytes": 0, "sha256": "", "created_at": clock()}
            insert_row(session, BlobManifest, id=blob_id, **values)
        try:
            return self._fill(blob_id, chunks)
        except BaseException:
            self.delete(blob_id)
            raise

    def read(self, blob_id: str) -> Iterator[bytes]:
        """The bytes, a chunk at a time, each verified. Raises: StorageError naming the chunk that is missing or damaged."""
        with reading(self._engine) as session:
            manifest = session.get(BlobManifest, blob_id)
        if manifest is None or manifest.status != READY:
            raise StorageError(f"There is no blob {blob_id}.", retryable=False)
        for position in range(-(-manifest.bytes // CHUNK_BYTES)):
            yield self._read_chunk(blob_id, position)

    def delete(self, blob_id: str) -> None:
        """Ends the blob's hold on its chunks; `collect` frees those that nobody else holds."""
        with writing(self._engine) as session:
            session.execute(delete(BlobManifest).where(BlobManifest.id == blob_id))

    def collect(self, *, grace_seconds: float = GRACE_SECONDS) -> int:
        """How many chunks without any reference were removed; see `blob_collector`."""
        return collect(self._database, self._objects, grace_seconds=grace_seconds)

    def _fill(self, blob_id: str, chunks: Iterable[bytes]) -> BlobInfo:
        size, whole = 0, hashlib.sha256()
        for position, chunk in enumerate(_regroup(chunks)):
            size += len(chunk)
            whole.update(chunk)
            self._store_chunk(blob_id, position, chunk)
        info = BlobInfo(blob_id, size, whole.hexdigest())
        with writing(self._engine) as session:
            _renew(session, blob_id)
            values = {"status": READY, "expires_at": None, "bytes": size, "sha256": info.sha256}
            session.execute(update(BlobManifest).where(BlobManifest.id == blob_id).values(values))
        return info

    def _store_chunk(self, blob_id: str, position: int, chunk: bytes) -> None:
        digest = hashlib.sha256(chunk).hexdigest()
        with writing(self._engine) as session:
            _renew(session, blob_id)
            is_stored = _lock_chunk(session, digest)
            if not is_stored and self._objects is None:
                insert_or_skip(session, BlobChunk, digest=digest, size=len(chunk), data=chunk)
                is_stored = True
            if is_stored:
                _refer(session, blob_id, position, digest)
        if not is_stored:
            self._store_object(blob_id, position, digest, chunk)

    def _store_object(self, blob_id: str, position: int, digest: str, chunk: bytes) -> None:
        """Every object is garbage until a chunk names it, so a writer that dies between the two leaves nothing for ever."""
        assert self._objects is not None
        key = f"{digest}.{secrets.token_hex(8)}"
        with writing(self._engine) as session:
            insert_row(session, BlobGarbage, object_key=key, not_before=_expiry(), is_claimed=False)
        self._objects.put(key, chunk)
        with writing(self._engine) as session:
            _renew(session, blob_id)
            if insert_or_skip(session, BlobChunk, digest=digest, size=len(chunk), object_key=key) is not None:
                _take_over(session, key)
            _refer(session, blob_id, position, digest)

    def _read_chunk(self, blob_id: str, position: int) -> bytes:
        query = select(BlobChunk).join(BlobChunkRef, BlobChunkRef.digest == BlobChunk.digest)
        with reading(self._engine) as session:
            chunk = session.execute(
                query.where(BlobChunkRef.manifest_id == blob_id, BlobChunkRef.position == position)
            ).scalar_one_or_none()
        if chunk is None:
            raise StorageError(f"Blob {blob_id}: chunk {position} is missing.", retryable=False)
        data = chunk.data
        if data is None:
            if self._objects is None or chunk.object_key is None:
                raise StorageError(
                    f"Blob {blob_id}: chunk {position} lies in an object store, but HONE_BLOB_URL names none.", retryable=False
                )
            data = self._objects.get(chunk.object_key)
        if hashlib.sha256(data).hexdigest() != chunk.digest:
            raise StorageError(f"Blob {blob_id}: chunk {position} ({chunk.digest[:12]}) is damaged.", retryable=False)
        return data


def _expiry() -> object:
    return clock() + UPLOAD_TTL_SECONDS


def _renew(session: Session, blob_id: str) -> None:
    statement = update(BlobManifest).where(BlobManifest.id == blob_id, BlobManifest.status == UPLOADING)
    if update_row(session, statement.values(expires_at=_expiry()), BlobManifest) is None:
        raise StorageError(f"The upload of blob {blob_id} stood still too long and was given up.")


def _lock_chunk(session: Session, digest: str) -> bool:
    """Whether the chunk is stored; if so, the collector cannot take it before this transaction has referred to it."""
    query = select(BlobChunk.digest).where(BlobChunk.digest == digest).with_for_update(read=True, key_share=True)
    return session.execute(query).first() is not None


def _refer(session: Session, blob_id: str, position: int, digest: str) -> None:
    insert_row(session, BlobChunkRef, manifest_id=blob_id, position=position, digest=digest)


def _take_over(session: Session, key: str) -> None:
    statement = (
        delete(BlobGarbage).where(BlobGarbage.object_key == key, BlobGarbage.is_claimed.is_(False)).returning(BlobGarbage.object_key)
    )
    if session.execute(statement).first() is None:
        raise StorageError(f"The upload of chunk {key} took too long and was given up.")


def _regroup(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks of exactly CHUNK_BYTES, the last one shorter."""
    buffer = bytearray()
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            taken = rest[: CHUNK_BYTES - len(buffer)]
            buffer += taken
            rest = rest[len(taken) :]
            if len(buffer) == CHUNK_BYTES:
                yield bytes(buffer)
                buffer.clear()
    if buffer:
        yield bytes(buffer)

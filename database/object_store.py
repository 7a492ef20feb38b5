"""Chunk bytes in a folder or an S3 bucket (`HONE_BLOB_URL`). Knows keys and bytes; what they mean stands in the database."""

from datetime import timedelta
from typing import Any

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from core.errors import StorageError

FOLDER = "file://"
_RETRY: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}


class ObjectStore:
    def __init__(self, store: Any) -> None:
        self._store = store

    def put(self, key: str, data: bytes) -> None:
        """Raises: StorageError."""
        try:
            obstore.put(self._store, _path(key), data)
        except (BaseError, OSError) as error:
            raise StorageError(f"The object store did not take chunk {key}: {error}") from error

    def get(self, key: str) -> bytes:
        """Raises: StorageError."""
        try:
            return bytes(obstore.get(self._store, _path(key)).bytes())
        except FileNotFoundError as error:
            raise StorageError(f"The object store has no chunk {key}.", retryable=False) from error
        except (BaseError, OSError) as error:
            raise StorageError(f"The object store did not give chunk {key}: {error}") from error

    def delete(self, key: str) -> None:
        """An object that is not there is deleted already. Raises: StorageError."""
        try:
            obstore.delete(self._store, _path(key))
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise StorageError(f"The object store did not delete chunk {key}: {error}") from error


def open_object_store(url: str) -> ObjectStore:
    """The store at `file:///folder` (made if need be) or `s3://bucket/prefix` (credentials from the AWS environment)."""
    if url.startswith(FOLDER):
        return ObjectStore(LocalStore(url.removeprefix(FOLDER), mkdir=True))
    timeouts: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5)}
    return ObjectStore(from_url(url, client_options=timeouts, retry_config=_RETRY))


def _path(key: str) -> str:
    """Spread over 256 folders, which a file system needs and a bucket does not mind."""
    return f"{key[:2]}/{key}"

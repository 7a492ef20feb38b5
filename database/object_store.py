"""Chunk bytes in a folder or an S3 bucket (`HONE_BLOB_URL`). Knows keys and bytes; what they mean stands in the database."""

import os
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
            raise StorageError(f"The object store did not take chunk {key}: {_first_line(error)}") from error

    def get(self, key: str) -> bytes:
        """Raises: StorageError."""
        try:
            return bytes(obstore.get(self._store, _path(key)).bytes())
        except FileNotFoundError as error:
            raise StorageError(f"The object store has no chunk {key}.", retryable=False) from error
        except (BaseError, OSError) as error:
            raise StorageError(f"The object store did not give chunk {key}: {_first_line(error)}") from error

    def delete(self, key: str) -> None:
        """An object that is not there is deleted already. Raises: StorageError."""
        try:
            obstore.delete(self._store, _path(key))
        except FileNotFoundError:
            return
        except (BaseError, OSError) as error:
            raise StorageError(f"The object store did not delete chunk {key}: {_first_line(error)}") from error


def open_object_store(url: str) -> ObjectStore:
    """The store at `file:///folder` (made if need be) or `s3://bucket/prefix`.

    Credentials, AWS_REGION, AWS_ENDPOINT and AWS_ALLOW_HTTP come from the environment, as for every S3 client.
    """
    if url.startswith(FOLDER):
        return ObjectStore(LocalStore(url.removeprefix(FOLDER), mkdir=True))
    allow_http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    client: Any = {"timeout": timedelta(seconds=60), "connect_timeout": timedelta(seconds=5), "allow_http": allow_http}
    return ObjectStore(from_url(url, client_options=client, retry_config=_RETRY))


def _path(key: str) -> str:
    """Spread over 256 folders, which a file system needs and a bucket does not mind."""
    return f"{key[:2]}/{key}"


def _first_line(error: Exception) -> str:
    """Without the pages of internals that the client appends."""
    return str(error).partition("\n")[0]

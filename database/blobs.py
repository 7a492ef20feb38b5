"""Byte strings of any size as content-addressed chunks of 1 MiB: in the database, or in an object store by setting.

Never addressable by hash from outside. Nothing here holds more than two chunks in memory, and no transaction waits for a caller
or for the object store.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class BlobInfo:
    id: str
    bytes: int
    sha256: str

"""What a folder of weights is, independent of where it lies: the digest that a registered model is pinned by."""

import hashlib
from pathlib import Path

BLOCK = 1024 * 1024


def folder_digest(folder: Path) -> str:
    """SHA-256, in hex, over every file below `folder`: sorted relative name, size and content of each. Times and modes do not count."""
    digest = hashlib.sha256()
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for name in sorted(files):
        size = files[name].stat().st_size
        digest.update(f"{len(name.encode())} {size}\n".encode())
        digest.update(name.encode())
        with open(files[name], "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()

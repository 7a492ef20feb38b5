"""`python -m local.platform_database`: the secret key and the first admin key of a fresh installation.

The one file of this room that may import `database`; `hone up` runs it as a process of its own, after the migrations.
"""

import os
import sys
from pathlib import Path

from core.settings import load_settings
from database.projects import ensure_first_admin
from database.secrets import ensure_secret_key
from database.session import open_database


def write_key(path: Path, clear_key: str) -> None:
    """The file with mode 0600 from its first moment."""
    temporary = path.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "w", encoding="ascii") as file:
        file.write(clear_key + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def main() -> None:
    """Written before the commit: a crash between the two leaves a key that the next start replaces, never a locked house."""
    settings = load_settings()
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    ensure_secret_key(settings)
    path = settings.home / "api_key"
    database = open_database(settings)
    try:
        with database.transaction() as session:
            clear_key = ensure_first_admin(session)
            if clear_key is not None:
                write_key(path, clear_key)
    finally:
        database.close()
    if clear_key is not None:
        sys.stdout.write(f"The first admin key lies in {path}\n")


if __name__ == "__main__":
    main()

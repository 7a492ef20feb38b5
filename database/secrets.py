"""Secrets at rest: encrypted columns, and the key that opens them. Never logs, never puts a secret into an error."""

import json
import os
import tempfile
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from core.errors import StorageError
from core.settings import Settings


class Secrets:
    """Encrypts with the first of `keys` (Fernet keys, newest first, separated by commas), decrypts with any of them."""

    def __init__(self, keys: str) -> None:
        try:
            self._fernet = MultiFernet([Fernet(key.strip()) for key in keys.split(",") if key.strip()])
        except ValueError:
            raise ValueError(
                "HONE_SECRET_KEY must be one or more Fernet keys (32 bytes in url-safe base64), separated by commas."
            ) from None

    def encrypt(self, value: dict[str, Any]) -> str:
        return self._fernet.encrypt(json.dumps(value).encode()).decode()

    def decrypt(self, token: str) -> dict[str, Any]:
        """Raises: StorageError when none of the keys encrypted `token`."""
        try:
            clear = self._fernet.decrypt(token)
        except InvalidToken:
            raise StorageError("A stored secret cannot be decrypted: HONE_SECRET_KEY lacks the key it was stored with.") from None
        value: dict[str, Any] = json.loads(clear)
        return value


def load_secrets(settings: Settings) -> Secrets:
    """Raises: StorageError when neither HONE_SECRET_KEY nor `home/secret_key` is there."""
    keys = settings.secret_key.get_secret_value()
    if keys:
        return Secrets(keys)
    path = settings.home / "secret_key"
    if not path.exists():
        raise StorageError(f"No secret key: set HONE_SECRET_KEY, or start once with a home that may be written ({path}).", retryable=False)
    return Secrets(path.read_text(encoding="ascii"))


def ensure_secret_key(settings: Settings) -> None:
    """Writes `home/secret_key` (mode 0600) unless a key is there or in the environment. Two at once agree on one key."""
    path = settings.home / "secret_key"
    if settings.secret_key.get_secret_value() or path.exists():
        return
    settings.home.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(prefix="secret_key.", dir=settings.home)
    with os.fdopen(descriptor, "wb") as file:
        file.write(Fernet.generate_key() + b"\n")
        file.flush()
        os.fsync(descriptor)
    try:
        os.link(aside, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(aside)

"""Signatures of the Standard Webhooks specification, for grader calls and webhooks alike.

Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md (symmetric scheme, v1).
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping

from core.errors import InvalidRequest, NotAuthenticated

SECRET_PREFIX = "whsec_"
TOLERANCE_SECONDS = 300
ID_HEADER, TIMESTAMP_HEADER, SIGNATURE_HEADER = "webhook-id", "webhook-timestamp", "webhook-signature"


def generate_secret() -> str:
    """A new signing secret of 256 random bits."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(32)).decode()


def sign(secret: str, message_id: str, timestamp: int, body: bytes, previous: str | None = None) -> dict[str, str]:
    """The three headers that prove that `body` was sent at `timestamp` (unix seconds) by a holder of `secret`.

    With `previous` a second signature by it follows the first, for receivers that do not have the new secret yet.
    """
    keys = [secret] if previous is None else [secret, previous]
    signatures = [base64.b64encode(_digest(key, message_id, str(timestamp), body)).decode() for key in keys]
    return {ID_HEADER: message_id, TIMESTAMP_HEADER: str(timestamp), SIGNATURE_HEADER: " ".join(f"v1,{text}" for text in signatures)}


def verify(secret: str, headers: Mapping[str, str], body: bytes, *, now: float | None = None) -> None:
    """Raises: NotAuthenticated unless one of the signatures in `headers` is right and not older or newer than five minutes."""
    lowered = {name.lower(): value for name, value in headers.items()}
    try:
        message_id, timestamp = lowered[ID_HEADER], lowered[TIMESTAMP_HEADER]
        signatures = lowered[SIGNATURE_HEADER].split(" ")
        age = (time.time() if now is None else now) - int(timestamp)
    except (KeyError, ValueError) as error:
        raise NotAuthenticated("The signature headers are missing or malformed.", code="invalid_signature") from error
    if abs(age) > TOLERANCE_SECONDS:
        raise NotAuthenticated("The signed timestamp is too old or too new.", code="invalid_signature")
    expected = "v1," + base64.b64encode(_digest(secret, message_id, timestamp, body)).decode()
    if not any(hmac.compare_digest(expected.encode(), given.encode()) for given in signatures):
        raise NotAuthenticated("No signature matches.", code="invalid_signature")


def _digest(secret: str, message_id: str, timestamp: str, body: bytes) -> bytes:
    return hmac.digest(_key(secret), f"{message_id}.{timestamp}.".encode() + body, hashlib.sha256)


def _key(secret: str) -> bytes:
    """The bytes behind `whsec_<base64>`. Raises: InvalidRequest, which does not quote the secret."""
    encoded = secret.removeprefix(SECRET_PREFIX)
    try:
        key = base64.b64decode(encoded + "=" * (-len(encoded) % 4), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise InvalidRequest(f"A signing secret is '{SECRET_PREFIX}' and base64 of at least one byte.", param="signing_secret")
    return key

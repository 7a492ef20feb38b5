"""Takes secrets out of text that is shown or kept: an endpoint may echo its headers, a library may print them."""

import json
import re
from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, quote_plus, unquote, urlsplit

MASK = "**********"
MIN_SECRET_CHARACTERS = 4
"""Shorter values are not secrets, and masking them would make texts unreadable."""

MIN_ENCODED_CHARACTERS = 8
"""Shorter ones leave so little in base64 that it could be any text."""


class Redactor:
    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in _forms(secret) if len(form) >= MIN_SECRET_CHARACTERS}
        longest_first = sorted(forms, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if forms else None

    def clean(self, text: str) -> str:
        return self._pattern.sub(MASK, text) if self._pattern else text

    def clean_optional(self, text: str | None) -> str | None:
        return None if text is None else self.clean(text)


def secret_values(secrets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Every secret in {secret_ref: {"headers", "signing_secret", "previous_signing_secret"}}, signing secrets also without their prefix."""
    values: list[str] = []
    for entry in secrets.values():
        values += (entry.get("headers") or {}).values()
        for name in ("signing_secret", "previous_signing_secret"):
            if signing_secret := entry.get(name):
                values += [signing_secret, signing_secret.removeprefix("whsec_")]
    return values


def url_secrets(url: str) -> list[str]:
    """The password in `url`, as it stands there and as it is meant."""
    password = urlsplit(url).password
    return [] if password is None else [password, unquote(password)]


def _forms(secret: str) -> list[str]:
    """`secret` as it may be echoed: plain, its last word (`Bearer abc`), inside JSON, inside a URL, in base64 or hex."""
    words = {secret, secret.rpartition(" ")[2]}
    return [form for word in words for form in (word, json.dumps(word)[1:-1], *_in_url(word), *_in_base64(word), word.encode().hex())]


def _in_url(word: str) -> list[str]:
    quoted = [quote(word, safe=""), quote(word), quote_plus(word)]
    return quoted + [re.sub("%..", lambda match: match[0].lower(), form) for form in quoted]


def _in_base64(word: str) -> list[str]:
    """What all base64 texts share in which `word` lies, by where in a group of three bytes it begins; in both alphabets."""
    if len(word) < MIN_ENCODED_CHARACTERS:
        return []
    forms = []
    for offset in range(3):
        data = bytes(offset) + word.encode()
        shared = slice((offset * 8 + 5) // 6, len(data) * 8 // 6)
        forms += [encode(data).decode()[shared] for encode in (b64encode, urlsafe_b64encode)]
    return forms

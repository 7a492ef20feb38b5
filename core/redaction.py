"""Takes secrets out of text that is shown or kept: an endpoint may echo its headers, a library may print them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlsplit

MASK = "**********"
MIN_SECRET_CHARACTERS = 4
"""Shorter values are not secrets, and masking them would make texts unreadable."""


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
    """`secret` as it may be echoed: plain, its last word (`Bearer abc`), inside JSON, inside a URL."""
    words = {secret, secret.rpartition(" ")[2]}
    return [form for word in words for form in (word, json.dumps(word)[1:-1], quote(word, safe=""))]

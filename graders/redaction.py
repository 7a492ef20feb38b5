"""Takes a job's secrets out of text that came from outside: an endpoint may answer with the very headers it was sent."""

import json
import re
from collections.abc import Iterable, Mapping
from urllib.parse import quote

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


def endpoint_redactor(headers: Mapping[str, str], signing_secret: str | None) -> Redactor:
    return Redactor([*headers.values(), *([signing_secret, signing_secret.removeprefix("whsec_")] if signing_secret else [])])


def _forms(secret: str) -> list[str]:
    """`secret` as it may be echoed: plain, its last word (`Bearer abc`), inside JSON, inside a URL."""
    words = {secret, secret.rpartition(" ")[2]}
    return [form for word in words for form in (word, json.dumps(word)[1:-1], quote(word, safe=""))]

"""Keeps the job's secrets out of everything that the trainer writes: log, events, explanations."""

import logging
from typing import Any

MASK = "**********"
MIN_PART = 8


class Redactor:
    """Replaces every secret of {secret_ref: {"headers": {...}, "signing_secret": str | None}} by a mask."""

    def __init__(self, secrets: dict[str, dict[str, Any]]) -> None:
        values: set[str] = set()
        for entry in secrets.values():
            for value in [*(entry.get("headers") or {}).values(), entry.get("signing_secret")]:
                if value:
                    values |= {value, *(part for part in value.split() if len(part) >= MIN_PART)}
        self._values = sorted(values, key=len, reverse=True)

    def clean(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, MASK)
        return text

    def clean_optional(self, text: str | None) -> str | None:
        return None if text is None else self.clean(text)


class RedactingFormatter(logging.Formatter):
    """Formats whole records, tracebacks included, and cleans the text."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.clean(super().format(record))

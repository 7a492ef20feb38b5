"""Log lines without the job's secrets."""

import logging

from core.redaction import Redactor


class RedactingFormatter(logging.Formatter):
    """Formats whole records, tracebacks included, and cleans the text."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.clean(super().format(record))

"""Turns the trainer's lines into rows, each once: the rows, the byte offset and the guarded update of the job are one transaction."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from core.errors import TrainingError
from core.run_directory import EVENTS, METRICS, SAMPLES, EventLine, MetricsLine, SampleLine, whole_lines
from database.progress import relay_offset, store_events, store_metrics, store_samples
from worker.context import Holding


class InvalidOutput(TrainingError):
    """A line of the trainer that cannot be read: trainer and worker do not speak the same format."""

    code = "invalid_trainer_output"


class Channel(NamedTuple):
    file: str
    line: type[BaseModel]
    store: Callable[..., None]


CHANNELS = (
    Channel(METRICS, MetricsLine, store_metrics),
    Channel(SAMPLES, SampleLine, store_samples),
    Channel(EVENTS, EventLine, store_events),
)


class Relay:
    """Forwards the output of one attempt's directory under the token of `holding`, which may be a later attempt's."""

    def __init__(self, holding: Holding, directory: Path, attempt: int) -> None:
        self._holding, self._directory, self._attempt = holding, directory, attempt
        self._lock = threading.Lock()
        self._done_sizes: dict[str, int] = {}
        """By file: its size when nothing in it was left to store. While it stays that, the database is not asked."""

    def forward_new_lines(self) -> None:
        """Stores every whole line that is not stored yet. Raises: LeaseLost; InvalidOutput, after the lines before the bad one."""
        with self._lock:
            for channel in CHANNELS:
                while self._forward(channel):
                    continue

    def _forward(self, channel: Channel) -> bool:
        path = self._directory / channel.file
        size = path.stat().st_size if path.exists() else 0
        if size == self._done_sizes.get(channel.file, 0):
            return False
        offset = self._holding.read(lambda session: relay_offset(session, self._holding.job_id, self._attempt, channel.file))
        raw, _ = whole_lines(path, offset)
        lines, error = parse_lines(channel, raw)
        if lines:
            end = offset + sum(len(line) + 1 for line in raw[: len(lines)])
            self._store(channel, end, lines)
        if error is not None:
            raise error
        if not lines:
            self._done_sizes[channel.file] = size
        return bool(lines)

    def _store(self, channel: Channel, offset: int, lines: list[Any]) -> None:
        holding = self._holding
        holding.write(
            lambda session: channel.store(
                session, holding.job_id, holding.token, self._attempt, file=channel.file, offset=offset, lines=lines
            )
        )


def parse_lines(channel: Channel, raw: list[bytes]) -> tuple[list[BaseModel], InvalidOutput | None]:
    """The lines up to the first that cannot be read, and what is wrong with that one."""
    lines: list[BaseModel] = []
    for line in raw:
        try:
            lines.append(channel.line.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "the line"
            return lines, InvalidOutput(f"The trainer wrote a line to {channel.file} that cannot be read: '{where}': {first['msg']}.")
    return lines, None

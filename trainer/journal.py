"""Every verdict of a grader, written down before it is used, so that a resumed step asks for nothing that was answered."""

import hashlib
import json
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.run_directory import LineWriter, cut_torn_line, iter_rows
from graders.grade import Grade
from trainer.batch import Rollout


@dataclass(frozen=True)
class Occasion:
    """For what, and when, completions are graded."""

    job_id: str
    purpose: str
    """`rollout`, `evaluation` or `greedy`."""

    step: int
    round: int
    grader_version: str

    def key(self, rollout: Rollout) -> str:
        """Identifies one grade: the same completion of the same prompt at the same place in the run."""
        tokens = hashlib.sha256(",".join(map(str, rollout.token_ids)).encode()).hexdigest()
        place = f"{self.job_id}|{self.purpose}|{self.step}|{self.round}|{rollout.prompt.index}|{rollout.g}"
        return f"{place}|{tokens}|{self.grader_version}"


class RewardJournal:
    """rewards.jsonl. Lines: {"key", "purpose", "step", ...the grade}; of two with the same key the later one counts.

    Verdicts of the next step may come in, from the graders' thread, while the loop saves the present one.
    """

    def __init__(self, path: Path) -> None:
        cut_torn_line(path)
        self._lock = threading.Lock()
        self._grades: dict[str, tuple[str, int, Grade]] = {}
        if path.exists():
            for _, line in iter_rows(path):
                self._take(json.loads(line))
        self._writer = LineWriter(path, durable=True)

    def find(self, key: str) -> Grade | None:
        entry = self._grades.get(key)
        return None if entry is None else entry[2]

    def write(self, grades: list[tuple[Occasion, str, Grade]]) -> None:
        """Durable when this returns."""
        lines = [{"key": key, "purpose": at.purpose, "step": at.step, **asdict(grade)} for at, key, grade in grades]
        self._writer.write_many(lines)
        for line in lines:
            self._take(line)

    def forget_steps(self, last_step: int) -> None:
        """Frees what a resume point at `last_step` makes needless: only later steps can ever be repeated."""
        with self._lock:
            self._grades = {key: entry for key, entry in self._grades.items() if entry[1] > last_step}

    def lines_after(self, step: int) -> list[dict[str, Any]]:
        """What a resume point at `step` must carry: the verdicts of steps and evaluations that are not finished."""
        with self._lock:
            entries = list(self._grades.items())
        return [
            {"key": key, "purpose": purpose, "step": at, **asdict(grade)}
            for key, (purpose, at, grade) in entries
            if at > step or (at == step and purpose != "rollout")
        ]

    def close(self) -> None:
        self._writer.close()

    def _take(self, line: dict[str, Any]) -> None:
        with self._lock:
            fields = {name: value for name, value in line.items() if name not in ("key", "purpose", "step")}
            self._grades[line["key"]] = (line["purpose"], line["step"], Grade(**fields))

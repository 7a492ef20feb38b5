"""Follows a job to its end and shows how it goes: one line that changes on a terminal, plain lines elsewhere."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from client.client import Client
from examples.demo.programs import DemoFailed

POLL_SECONDS = 1.0
PLAIN_EVERY = 5
"""Steps between two lines when nobody watches a terminal."""
NOTES = {"running": ", beginning with the held-out questions before any training"}
FINAL = ("succeeded", "failed", "cancelled")
KL = ("kl_reference", "kl_old")
"""The first that the job reports: against the frozen reference where there is one, else against the policy before the update."""


@dataclass
class Progress:
    total_steps: int
    is_terminal: bool = field(default_factory=sys.stdout.isatty)
    step: int = 0
    values: dict[str, float] = field(default_factory=dict)
    after: int = 0
    first_step_at: float | None = None
    shown_step: int = 0

    def take(self, points: list[dict[str, Any]]) -> None:
        """Remembers the newest value of every training metric."""
        for point in points:
            if point["phase"] == "train" and point["value"] is not None:
                self.values[point["name"]] = point["value"]
                self.step = max(self.step, point["step"])
        if self.step and self.first_step_at is None:
            self.first_step_at = time.monotonic()

    def line(self) -> str:
        kl = next((f"{self.values[name]:.4f}" for name in KL if name in self.values), "-")
        reward = self.values.get("reward_mean")
        speed = self.values.get("tokens_per_second")
        parts = [f"step {self.step}/{self.total_steps}", f"reward {'-' if reward is None else f'{reward:.3f}'}", f"KL {kl}"]
        parts += [f"{'-' if speed is None else f'{speed:.0f}'} tokens/s", f"time left {self.time_left()}"]
        return "  ".join(parts)

    def time_left(self) -> str:
        if self.first_step_at is None or self.step < 2:
            return "-"
        seconds = (time.monotonic() - self.first_step_at) / (self.step - 1) * (self.total_steps - self.step)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def show(self) -> None:
        if self.is_terminal:
            sys.stdout.write(f"\r\x1b[K{self.line()}")
        elif self.step >= self.shown_step + PLAIN_EVERY or (self.step and not self.shown_step) or self.step == self.total_steps:
            if self.step == self.shown_step:
                return
            self.shown_step = self.step
            sys.stdout.write(self.line() + "\n")
        sys.stdout.flush()

    def say(self, text: str) -> None:
        sys.stdout.write(f"\r\x1b[K{text}\n" if self.is_terminal else f"{text}\n")
        sys.stdout.flush()


def follow(client: Client, job_id: str, total_steps: int, limit_seconds: float) -> dict[str, Any]:
    """The job once it has ended. Raises: DemoFailed when it does not succeed, or not in time."""
    progress = Progress(total_steps)
    deadline = time.monotonic() + limit_seconds
    status = ""
    while True:
        job = client.jobs.retrieve(job_id)
        page = client.jobs.metrics(job_id, after=progress.after)
        progress.after = page["last_seq"] or progress.after
        progress.take(page["data"])
        if job["status"] != status:
            status = str(job["status"])
            progress.say(f"job {job_id}: {status}{NOTES.get(status, '')}")
        progress.show()
        if status in FINAL:
            break
        if status == "paused":
            raise DemoFailed(f"The job paused itself ({job.get('pause_reason')}).\n{last_events(client, job_id)}")
        if time.monotonic() > deadline:
            raise DemoFailed(f"The job did not end within {limit_seconds / 60:.0f} minutes.")
        time.sleep(POLL_SECONDS)
    if status != "succeeded":
        raise DemoFailed(f"The job ended '{status}': {job.get('error')}\n{last_events(client, job_id)}")
    return job


def last_events(client: Client, job_id: str) -> str:
    events = client.jobs.events(job_id, limit=10)["data"]
    return "\n".join(f"  | {event['level']}: {event['message']}" for event in reversed(events))

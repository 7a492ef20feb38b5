"""A program that speaks core/run_directory.py like the real trainer, in milliseconds and without torch, and misbehaves as told.

`python fake_trainer.py PLAN RUN_DIRECTORY --secrets-fd N`, PLAN being JSON: see DEFAULTS; "attempts": {"1": {...}} overrides
it for one attempt.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from core import run_directory as files
from core.run_directory import Control, End, FileEntry, LineWriter, Manifest, MetricsLine, Outcome, SampleLine

DEFAULTS = {
    "steps": 4,
    "seconds": 0.0,
    "resume_every": 1,
    "checkpoint_every": 2,
    "claims_model": None,
    "crash_at": None,
    "kill_at": None,
    "hang_at": None,
    "garbage_at": None,
    "fail_at": None,
    "failure": {},
    "pause_reason": None,
    "final_words": "",
    "touches_progress": True,
    "shows_secrets": False,
}


class FakeTrainer:
    def __init__(self, plan: dict, directory: Path, secrets: dict) -> None:
        self.directory, self.secrets = directory, secrets
        self.job = files.ResolvedJob.model_validate_json((directory / files.JOB).read_text())
        self.plan = {**DEFAULTS, **plan, **plan.get("attempts", {}).get(str(self.job.attempt), {})}
        self.rows = [json.loads(line) for _, line in files.iter_rows(directory / files.TRAIN)]
        assert (directory / files.MODEL / "config.json").is_file()
        self.metrics = LineWriter(directory / files.METRICS)
        self.events = LineWriter(directory / files.EVENTS)
        self.samples = LineWriter(directory / files.SAMPLES)
        self.terminated = False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))

    def run(self) -> Outcome:
        state = self.directory / files.RESUME / "state.json"
        step = json.loads(state.read_text())["step"] if state.exists() else 0
        digest = hashlib.sha256(json.dumps(self.secrets, sort_keys=True).encode()).hexdigest()
        self.say(f"from step {step} with {len(self.rows)} rows and secrets {digest}")
        while step < self.plan["steps"]:
            step += 1
            self.misbehave(step)
            self.do_step(step)
            if (control := self.read_control()) is not None:
                return self.stop(control, step)
        return self.outcome(End.SUCCEEDED, step, final_checkpoint=self.plan["claims_model"] or files.step_folder(step))

    def do_step(self, step: int) -> None:
        time.sleep(self.plan["seconds"])
        self.touch()
        values = {"reward_mean": step / self.plan["steps"], "attempt": float(self.job.attempt)}
        self.metrics.write(MetricsLine(step=step, phase="train", values=values, total_steps=self.plan["steps"]))
        common = {"step": step, "phase": "train", "prompt_index": step, "prompt": "p", "finish_reason": "stop", "num_tokens": 1}
        self.samples.write_many([SampleLine(**common, g=g, completion=f"c{g}", reward=0.5, grader_version="v") for g in range(2)])
        if step % self.plan["checkpoint_every"] == 0 or step == self.plan["steps"]:
            self.publish(files.CHECKPOINTS, step, "weights.bin", bytes([step]) * 1_200_000)
        if step % self.plan["resume_every"] == 0 and step < self.plan["steps"]:
            self.publish(files.RESUME_POINTS, step, "state.json", json.dumps({"step": step}).encode())

    def misbehave(self, step: int) -> None:
        if step == self.plan["crash_at"]:
            print(self.plan["final_words"] + (json.dumps(self.secrets) if self.plan["shows_secrets"] else ""), file=sys.stderr, flush=True)
            os._exit(9)
        if step == self.plan["kill_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.plan["garbage_at"]:
            with open(self.directory / files.METRICS, "ab") as file:
                file.write(b'{"step": "three"}\n')
            self.hang()
        if step == self.plan["hang_at"]:
            self.hang()
        if step == self.plan["fail_at"]:
            raise Failed

    def hang(self) -> None:
        """Deaf to everything but SIGKILL, while a thread would still touch `beat`."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            self.touch()
            time.sleep(0.05)

    def touch(self) -> None:
        (self.directory / files.BEAT).touch()
        if self.plan["touches_progress"]:
            (self.directory / files.PROGRESS).touch()

    def read_control(self) -> Control | None:
        return files.read_control(self.directory) or (Control.DRAIN if self.terminated else None)

    def stop(self, control: Control, step: int) -> Outcome:
        if control == Control.CANCEL:
            return self.outcome(End.CANCELLED, step)
        self.publish(files.RESUME_POINTS, step, "state.json", json.dumps({"step": step}).encode())
        return self.outcome(End.PAUSED, step)

    def outcome(self, end: End, step: int, **values: object) -> Outcome:
        if end == End.SUCCEEDED and self.plan["pause_reason"]:
            end, values = End.PAUSED, {"pause_reason": self.plan["pause_reason"]}
        return Outcome(end=end, step=step, trained_tokens=100 * step, **values)

    def publish(self, kind: str, step: int, name: str, content: bytes) -> None:
        folder = self.directory / kind / files.step_folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        entry = FileEntry(name=name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        metrics = {"valid_reward_mean": step / 10}
        files.publish_json(
            folder / files.MANIFEST, Manifest(kind=kind[:-1], step=step, files=[entry], metrics=metrics, facts={"format": "full"})
        )

    def say(self, message: str) -> None:
        self.events.write(files.EventLine(created_at=time.time(), level="info", message=message))


class Failed(Exception):
    pass


def main() -> None:
    plan, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    assert sys.argv[3] == files.SECRETS_FD
    with open(int(sys.argv[4]), "rb") as pipe:
        secrets = json.loads(pipe.read())["secrets"]
    trainer = FakeTrainer(plan, directory, secrets)
    try:
        outcome = trainer.run()
    except Failed:
        outcome = Outcome(end=End.FAILED, step=1, **trainer.plan["failure"])
    files.publish_json(directory / files.OUTCOME, outcome)


if __name__ == "__main__":
    main()

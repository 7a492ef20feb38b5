"""`python -m tests.resume.killed_trainer FAULT RUN_DIRECTORY ...`: the trainer, which kills itself at one place of one step.

FAULT is a `Fault` as JSON. A line in the directory's file `killed` says where; it is on disk before the signal is sent.
"""

import asyncio
import functools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch

import trainer.checkpoints
from core.run_directory import CHECKPOINTS, MANIFEST, LineWriter, MetricsLine, step_folder
from trainer.__main__ import main
from trainer.engine_native import NativeEngine
from trainer.evaluation import Evaluator
from trainer.grading import GradingRound, GradingService
from trainer.journal import Occasion, RewardJournal
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling
from trainer.update import Learner

KILLED = "killed"


@dataclass(frozen=True)
class Fault:
    place: str
    """A name in PLACES."""

    step: int
    """0 where the place itself says which step it is in."""

    nth: int = 1
    """The passage of the place, within the step, at which it happens."""

    folder: str = CHECKPOINTS
    """`checkpoints` or `resume_points`, where the place is the writing of one."""

    def __str__(self) -> str:
        number = f" {self.nth}" if self.nth > 1 else ""
        where = f" of {self.folder}" if self.place in FOLDER_PLACES else ""
        return self.place + number + where


class Trap:
    """Counts the passages of the place while it is set, and kills the process at the n-th."""

    def __init__(self, fault: Fault, run_directory: Path) -> None:
        self.fault = fault
        self._run_directory = run_directory
        self._is_set = False
        self._count = 0

    @contextmanager
    def set_while(self, condition: bool) -> Iterator[None]:
        before, self._is_set = self._is_set, condition
        try:
            yield
        finally:
            self._is_set = before

    def is_due(self) -> bool:
        """To be asked once at each passage."""
        self._count += 1
        return self._count == self.fault.nth

    def passes(self) -> None:
        if self._is_set and self.is_due():
            self.kill()

    def before(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """A wrapper that passes the place before each call."""
        self.passes()
        return original(*arguments, **named)

    def after(self, original: Any, *arguments: Any, **named: Any) -> Any:
        """A wrapper that passes the place after each call."""
        result = original(*arguments, **named)
        self.passes()
        return result

    def kill(self) -> NoReturn:
        with open(self._run_directory / KILLED, "a") as file:
            file.write(json.dumps({**asdict(self.fault), "pid": os.getpid()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("SIGKILL does not come back")

    def is_temporary(self, folder: Path) -> bool:
        """Whether `folder` is where the step's checkpoint or resume point is being written, beside its final place."""
        return folder.name == f"{step_folder(self.fault.step)}.tmp" and folder.parent.name == self.fault.folder


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """From now on `owner.name(...)` is `wrapper(original, ...)`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        return wrapper(original, *arguments, **named)

    setattr(owner, name, wrapped)


def watch_sampling(trap: Trap, is_meant: Callable[[Sampling], bool]) -> None:
    def generate(original: Any, engine: Any, prompts: Any, group_size: int, sampling: Sampling, **named: Any) -> Any:
        with trap.set_while(is_meant(sampling)):
            return original(engine, prompts, group_size, sampling, **named)

    wrap(RolloutEngine, "generate", generate)
    wrap(NativeEngine, "step", trap.before)


def in_rollout(trap: Trap) -> None:
    """Before the n-th decode step of the step's completions."""
    watch_sampling(trap, lambda sampling: (sampling.purpose, sampling.step) == (Purpose.ROLLOUT, trap.fault.step))


def in_replacement(trap: Trap) -> None:
    """Before the n-th decode step of groups that take the place of others without signal, in the first step that has such."""
    watch_sampling(trap, lambda sampling: sampling.round_ > 0)


def in_evaluation(trap: Trap) -> None:
    """Before the n-th decode step of the evaluation that follows the step."""

    def evaluate(original: Any, evaluator: Any, step: int, *checks: Any) -> Any:
        with trap.set_while(step == trap.fault.step):
            return original(evaluator, step, *checks)

    wrap(Evaluator, "evaluate", evaluate)
    wrap(NativeEngine, "step", trap.before)


def in_grading(trap: Trap) -> None:
    """All completions of the step are there and half of their verdicts are journaled.

    Grading waits for the end of the rollout here: how many verdicts come earlier is a matter of time.
    """
    num_sampled: Future[int] = Future()
    num_written = 0

    def is_here(at: Occasion) -> bool:
        return (at.purpose, at.step) == ("rollout", trap.fault.step)

    def collect(original: Any, grading: Any, rollouts: Any, check: Any) -> Any:
        if is_here(grading._at) and not num_sampled.done():
            num_sampled.set_result(len(rollouts))
        return original(grading, rollouts, check)

    async def grade(original: Any, service: Any, at: Occasion, *sampled: Any) -> Any:
        if is_here(at):
            await asyncio.wrap_future(num_sampled)
        return await original(service, at, *sampled)

    def write(original: Any, journal: Any, grades: Any) -> None:
        nonlocal num_written
        for entry in grades:
            original(journal, [entry])
            num_written += is_here(entry[0])
            if is_here(entry[0]) and num_written == num_sampled.result() // 2:
                trap.kill()

    wrap(GradingRound, "collect", collect)
    wrap(GradingService, "_grade", grade)
    wrap(RewardJournal, "write", write)


def watch_update(trap: Trap, owner: Any, name: str) -> None:
    def update(original: Any, learner: Any, batch: Any, estimate: Any, plan: Any, step: int) -> Any:
        with trap.set_while(step == trap.fault.step):
            return original(learner, batch, estimate, plan, step)

    wrap(Learner, "update", update)
    wrap(owner, name, trap.after)


def after_backward(trap: Trap) -> None:
    """The n-th microbatch of the step has its gradient."""
    watch_update(trap, torch.Tensor, "backward")


def after_optimizer_step(trap: Trap) -> None:
    """The n-th optimizer step of the step has changed its weights; with a value model every second one is the value model's."""
    watch_update(trap, torch.optim.AdamW, "step")


def in_file(trap: Trap) -> None:
    """The n-th file is half written: of weights, values, optimizer state or rollouts sampled ahead."""

    def save(original: Any, value: Any, path: Any, *arguments: Any, **named: Any) -> None:
        original(value, path, *arguments, **named)
        if trap.is_temporary(Path(path).parent) and trap.is_due():
            os.truncate(path, os.path.getsize(path) // 2)
            trap.kill()

    wrap(safetensors.torch, "serialize_file", save)
    wrap(torch, "save", save)


def before_manifest(trap: Trap) -> None:
    """Every file lies there, synced, but the manifest."""

    def publish_json(original: Any, path: Path, value: Any) -> None:
        if path.name == MANIFEST and trap.is_temporary(path.parent):
            trap.kill()
        original(path, value)

    wrap(trainer.checkpoints, "publish_json", publish_json)


def before_rename(trap: Trap) -> None:
    """The folder is whole, with its manifest, and stands beside its final place."""

    def replace(original: Any, source: Any, target: Any) -> None:
        if trap.is_temporary(Path(source)):
            trap.kill()
        original(source, target)

    wrap(os, "replace", replace)


def in_removal(trap: Trap) -> None:
    """A folder that an earlier kill left half done is being removed: its files are gone, all but the manifest where that still stood."""

    def rmtree(original: Any, path: Any, *arguments: Any, **named: Any) -> None:
        if Path(path).exists() and trap.is_temporary(Path(path)):
            for file in Path(path).iterdir():
                if file.name != MANIFEST:
                    file.unlink()
            trap.kill()
        original(path, *arguments, **named)

    wrap(shutil, "rmtree", rmtree)


def in_record(trap: Trap) -> None:
    """The step's line of metrics is half written."""

    def write(original: Any, writer: Any, value: Any) -> None:
        if isinstance(value, MetricsLine) and (value.step, value.phase) == (trap.fault.step, "train"):
            line = value.model_dump_json().encode()
            writer._file.write(line[: len(line) // 2])
            trap.kill()
        original(writer, value)

    wrap(LineWriter, "write", write)


PLACES: dict[str, Callable[[Trap], None]] = {
    "decode step": in_rollout,
    "replacement": in_replacement,
    "half graded": in_grading,
    "backward": after_backward,
    "optimizer step": after_optimizer_step,
    "half a file": in_file,
    "before manifest": before_manifest,
    "before rename": before_rename,
    "evaluation": in_evaluation,
    "half a line": in_record,
    "removal": in_removal,
}
FOLDER_PLACES = frozenset({"half a file", "before manifest", "before rename", "removal"})


if __name__ == "__main__":
    planned = Fault(**json.loads(sys.argv[1]))
    PLACES[planned.place](Trap(planned, Path(sys.argv[2])))
    sys.exit(main(sys.argv[2:]))

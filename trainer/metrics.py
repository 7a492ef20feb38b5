"""What the outside sees of a run: metrics.jsonl, events.jsonl and samples.jsonl, and the digest that chains the steps."""

import hashlib
import math
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from core.redaction import Redactor
from core.run_directory import EVENTS, METRICS, SAMPLES, EventLine, LineWriter, MetricsLine, SampleLine
from trainer.batch import Batch, Estimate, Graded

Phase = Literal["train", "valid"]


class Stopwatch:
    """Seconds spent per phase since the last `take`."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def time(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            name = f"seconds_{phase}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        taken, self._seconds = self._seconds, {}
        return taken


class Recorder:
    """Writes whole lines; every text passes the redactor."""

    def __init__(self, run_directory: Path, redactor: Redactor, grader_version: str, total_steps: int) -> None:
        self._metrics = LineWriter(run_directory / METRICS)
        self._events = LineWriter(run_directory / EVENTS)
        self._samples = LineWriter(run_directory / SAMPLES)
        self._redactor, self._version, self._total_steps = redactor, grader_version, total_steps

    def event(
        self,
        message: str,
        level: Literal["info", "warn", "error"] = "info",
        *,
        is_metrics: bool = False,
        data: dict[str, Any] | None = None,
    ) -> None:
        line = EventLine(
            created_at=time.time(),
            level=level,
            message=self._redactor.clean(message),
            type="metrics" if is_metrics else "message",
            data=data or {},
        )
        self._events.write(line)

    def metrics(self, step: int, phase: Phase, values: dict[str, float], digest: str = "") -> None:
        self._metrics.write(MetricsLine(step=step, phase=phase, values=values, digest=digest, total_steps=self._total_steps))

    def samples(self, step: int, phase: Phase, graded: list[Graded], estimate: Estimate | None = None) -> None:
        advantages = None if estimate is None else row_advantages(estimate)
        lines = []
        for row, entry in enumerate(graded):
            advantage = None if advantages is None or entry.reward is None else advantages[row]
            lines.append(self._sample(step, phase, entry, advantage))
        self._samples.write_many(lines)

    def announce(self, step: int, train: dict[str, float], valid: dict[str, float]) -> None:
        """The step's event in the wire contract's words; `valid` is empty where nothing was evaluated."""
        parts = [f"Step {step}/{self._total_steps} "]
        if train:
            parts.append(f" train mean reward={train.get('reward_mean', float('nan')):.2f}")
        if valid:
            parts.append(f" full validation mean reward={valid.get('valid_reward_mean', float('nan')):.2f}")
        self.event(",".join(parts), is_metrics=True, data=contract_metrics(step, self._total_steps, train, valid))

    def close(self) -> None:
        for writer in (self._metrics, self._events, self._samples):
            writer.close()

    def _sample(self, step: int, phase: Phase, entry: Graded, advantage: float | None) -> SampleLine:
        rollout = entry.rollout
        finish: Literal["stop", "length"] = "length" if rollout.finish_reason == "length" else "stop"
        return SampleLine(
            step=step,
            phase=phase,
            prompt_index=rollout.prompt.index,
            g=rollout.g,
            prompt=rollout.prompt.text,
            completion=rollout.text,
            reward=entry.reward,
            sub_scores=entry.sub_scores,
            explanation=entry.explanation,
            advantage=advantage,
            finish_reason=finish,
            num_tokens=len(rollout.token_ids),
            grader_version=self._version,
            attempts=entry.attempts,
            latency_seconds=entry.latency_seconds,
            error=entry.error,
            error_message=entry.error_message,
        )


def row_advantages(estimate: Estimate) -> list[float]:
    """The advantage of each row's first token: for one number per completion that number, with a value model the whole answer's."""
    advantages: list[float] = estimate.advantages[:, 0].double().tolist()
    return advantages


def rollout_metrics(graded: list[Graded]) -> dict[str, float]:
    """What can be said of a step's completions without the model. Rewards are the raw grades, over graded completions only."""
    rewards = [entry.reward for entry in graded if entry.reward is not None]
    lengths = [len(entry.rollout.token_ids) for entry in graded]
    found = {
        "completion_tokens_mean": statistics.fmean(lengths),
        "completion_tokens_max": float(max(lengths)),
        "truncated_fraction": statistics.fmean(entry.rollout.finish_reason == "length" for entry in graded),
        "grader_failure_fraction": statistics.fmean(entry.error is not None for entry in graded),
        "grader_abstained_fraction": statistics.fmean(entry.error is None and entry.reward is None for entry in graded),
        "grader_latency_mean": statistics.fmean(entry.latency_seconds for entry in graded),
        "grader_attempts_mean": statistics.fmean(entry.attempts for entry in graded),
    }
    if rewards:
        found |= {"reward_mean": statistics.fmean(rewards), "reward_std": statistics.pstdev(rewards)}
        found |= {"reward_min": min(rewards), "reward_max": max(rewards)}
    for member, error in sorted((entry.failed_member or "", entry.error) for entry in graded if entry.error is not None):
        name = f"graders/{member}/errors/{error}" if member else f"grader_errors/{error}"
        found[name] = found.get(name, 0.0) + 1.0
    for name in sorted({name for entry in graded for name in entry.sub_scores}):
        scores = [entry.sub_scores[name] for entry in graded if name in entry.sub_scores]
        found[f"graders/{name}/reward_mean"] = statistics.fmean(scores)
    return found


def contract_metrics(step: int, total_steps: int, train: dict[str, float], valid: dict[str, float]) -> dict[str, Any]:
    """All metrics with the names that clients of the wire contract look for on top, under both spellings."""
    data: dict[str, Any] = {"step": step, "total_steps": total_steps, **train, **valid}
    scores: dict[str, float] = {}
    if "reward_mean" in train:
        data["train_mean_reward"] = scores["train_reward_mean"] = data["train_reward_mean"] = train["reward_mean"]
    if "valid_reward_mean" in valid:
        data["full_valid_mean_reward"] = scores["valid_reward_mean"] = valid["valid_reward_mean"]
    return {**data, "scores": scores}


def chained_digest(previous: str, graded: list[Graded], batch: Batch, report: dict[str, float]) -> str:
    """SHA-256 over the previous step's digest, token ids, log-probs, grades, what is trained on, and the bits of loss and gradient norm.

    `graded` is all that was sampled in the step, `batch` what the update saw.
    """
    chain = hashlib.sha256(previous.encode())
    for entry in graded:
        chain.update(np.asarray(entry.rollout.token_ids, dtype=np.int64).tobytes())
        grade = math.nan if entry.reward is None else entry.reward
        chain.update(np.asarray([*entry.rollout.logprobs, grade], dtype=np.float64).tobytes())
    chain.update(batch.rewards.cpu().numpy().tobytes())
    chain.update(batch.counts.cpu().numpy().tobytes())
    chain.update(np.asarray([report.get("loss", 0.0), report.get("grad_norm", 0.0)], dtype=np.float64).tobytes())
    return chain.hexdigest()


def peak_memory_bytes(device: torch.device) -> float:
    """Of the device's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

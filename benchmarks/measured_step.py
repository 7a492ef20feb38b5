"""One step of the trainer's own objects on made-up prompts and rewards, timed by phase. No grader, no files, no platform."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.operations import Shape, Work
from core.grader_specs import StringCheckGrader
from core.options import Options
from core.presets import resolve_options
from core.run_directory import ModelSource, ResolvedJob
from trainer.advantages import make_estimator
from trainer.batch import Graded, Prompt, Rollout
from trainer.config import set_up_machine
from trainer.data import collate
from trainer.policy import Policy
from trainer.random import Purpose
from trainer.rollout import RolloutEngine, Sampling
from trainer.update import Learner

SEED = 7
Seconds = dict[str, float]


def make_options(work: Work, precision: str) -> Options:
    given = {
        "finetuning": "full",
        "precision": precision,
        "batch_size": work.prompts,
        "group_size": work.group_size,
        "max_completion_tokens": work.completion_tokens,
        "kl_coefficient": 0.0,
        "learning_rate": 1e-6,
    }
    return resolve_options("grpo", given)


def prepare_machine(options: Options, num_threads: int) -> None:
    """Threads, determinism and precisions as the trainer sets them for a job."""
    grader = StringCheckGrader(type="string_check", input="", reference="", operation="eq")
    source = ModelSource(name="benchmark", digest="")
    set_up_machine(
        ResolvedJob(
            job_id="benchmark",
            attempt=1,
            algorithm="grpo",
            options=options,
            seed=SEED,
            grader=grader,
            model=source,
            num_threads=num_threads,
        )
    )


def random_model(shape: Shape) -> Any:
    """A Llama with random float32 weights."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config).eval()


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Every token is its own number in words."""
    words = {str(number): number for number in range(vocabulary)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))


class MeasuredStep:
    """A policy with its sampler and learner; `run` does one step and says how long each phase took."""

    def __init__(self, model: Any, tokenizer: Any, work: Work, precision: str, device: torch.device) -> None:
        self._work, self._device = work, device
        self._options = make_options(work, precision)
        policy = Policy(model.to(device), self._options, SEED, device, Path())
        self._engine = RolloutEngine(policy, tokenizer, precision)
        self._learner = Learner(policy, self._options, SEED, total_steps=1_000_000, on_progress=lambda: None)
        self._estimator = make_estimator(self._options)
        self._prompts = make_prompts(work, model.config.vocab_size)
        self._step = 0

    def run(self) -> Seconds:
        """Seconds of `rollout`, `update` (without the optimizer) and `optimizer`."""
        self._step += 1
        seconds: Seconds = {}
        with self._timed("rollout", seconds):
            rollouts = self.generate()
        graded = [Graded(rollout, reward=float(rollout.g % 2)) for rollout in rollouts]
        batch = collate(graded, self._options, self._device)
        with optimizer_seconds(seconds, self._device), self._timed("update", seconds):
            plan = self._learner.plan(batch, self._step)
            batch = self._learner.score(batch, plan)
            self._learner.update(batch, self._estimator(batch, 0.0), plan, self._step)
        seconds["update"] -= seconds["optimizer"]
        return seconds

    def generate(self) -> list[Rollout]:
        """Completions that never end before their last token."""
        sampling = Sampling(
            seed=SEED,
            purpose=Purpose.ROLLOUT,
            step=self._step,
            round_=0,
            temperature=1.0,
            max_completion_tokens=self._work.completion_tokens,
            stop=(),
            end_token_ids=frozenset(),
        )
        ignore = {"on_finished": lambda rollout: None, "check": lambda: None}
        return self._engine.generate(self._prompts, self._work.group_size, sampling, **ignore)

    @contextmanager
    def _timed(self, phase: str, seconds: Seconds) -> Iterator[None]:
        start = now(self._device)
        yield
        seconds[phase] = now(self._device) - start


def make_prompts(work: Work, vocabulary: int) -> list[Prompt]:
    draws = torch.randint(vocabulary, (work.prompts, work.prompt_tokens), generator=torch.Generator().manual_seed(SEED))
    return [Prompt(index, tuple(ids), "", {}) for index, ids in enumerate(draws.tolist())]


@contextmanager
def optimizer_seconds(seconds: Seconds, device: torch.device) -> Iterator[None]:
    """Adds what every optimizer step takes within the block to `seconds["optimizer"]`."""
    starts: list[float] = []
    seconds["optimizer"] = 0.0

    def begin(*_: Any) -> None:
        starts.append(now(device))

    def end(*_: Any) -> None:
        seconds["optimizer"] += now(device) - starts.pop()

    hooks = [register_optimizer_step_pre_hook(begin), register_optimizer_step_post_hook(end)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def now(device: torch.device) -> float:
    """Seconds, once everything that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def best_seconds(measured: list[Seconds]) -> Seconds:
    """Of each phase the shortest: whatever else the machine had to do only adds."""
    return {phase: min(each[phase] for each in measured) for phase in measured[0]}

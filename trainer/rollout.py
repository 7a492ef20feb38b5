"""Completions sampled from the policy. Which rows sit in the batch together never changes what random number a token gets.

Shapes and the order in which rows come and go depend on the prompts, the weights and the sampling alone, never on the clock.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from core.errors import InvalidRequest
from trainer.batch import Prompt, Rollout, Support
from trainer.engine_families import is_native
from trainer.engine_generic import GenericEngine
from trainer.engine_native import NativeEngine
from trainer.engine_sampling import kept_ids, kept_tokens, sample_tokens
from trainer.policy import Policy
from trainer.random import Purpose, uniforms
from trainer.tokens import TextSoFar

MAX_ROWS = 256
CACHE_BYTES = 4 * 2**30
"""What the key-value cache may take; it lowers the number of rows, but not below one group."""
CHUNK_TOKENS = 8
"""Decode steps between two calls of `check`."""
UNIFORMS_AHEAD = 64
"""Tokens of a row whose random numbers are made together."""


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: the coordinates of their random numbers and when they end."""

    seed: int
    purpose: Purpose
    step: int
    round_: int
    temperature: float
    """0 takes the most likely token; for evaluation only."""

    max_completion_tokens: int
    stop: tuple[str, ...]
    end_token_ids: frozenset[int]
    top_k: int | None = None
    """Only the top_k likeliest tokens are drawn. None: off."""

    top_p: float = 1.0
    """Of these only the fewest whose share reaches top_p. 1: off."""

    min_p: float = 0.0
    """Of these only those at least min_p times as likely as the likeliest. 0: off."""

    @property
    def is_restricted(self) -> bool:
        """Whether rollouts carry a support. Temperature 0 has no distribution to restrict."""
        return self.temperature > 0.0 and (self.top_k is not None or self.top_p < 1.0 or self.min_p > 0.0)

    def kept_tokens(self, logits: Tensor) -> Tensor:
        """[b, V] -> [b, V] bool: what may be drawn."""
        return kept_tokens(logits, self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


class Engine(Protocol):
    """Turns tokens into the logits of the next; rows are numbered from 0 in the order in which they were admitted."""

    admits_at_any_time: bool

    def admit(self, prompts: list[tuple[int, ...]], copies: int) -> Tensor: ...

    def step(self, tokens: Tensor) -> Tensor: ...

    def keep(self, order: list[int]) -> None: ...


@dataclass
class _Row:
    prompt: Prompt
    place: int
    """Where its prompt stands in the call."""
    g: int
    text: TextSoFar
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)
    """Of the `UNIFORMS_AHEAD` tokens from the last multiple of that on."""
    kept: list[Tensor] = field(default_factory=list)
    """The support of each token; empty without one."""


class RolloutEngine:
    """Samples from the current weights of `policy`; the working copy is made anew by every `generate`."""

    def __init__(self, policy: Policy, tokenizer: Any, precision: str, *, max_rows: int = MAX_ROWS) -> None:
        self._policy = policy
        self._tokenizer = tokenizer
        self._dtype = torch.bfloat16 if precision == "bf16" else policy.compute_dtype
        self._max_rows = max_rows

    @property
    def is_native(self) -> bool:
        """Whether the model's family is decoded by our own engine; if not, by the library's forward pass."""
        return is_native(self._policy.model)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        group_size: int,
        sampling: Sampling,
        *,
        on_finished: Callable[[Rollout], None],
        check: Callable[[], None],
    ) -> list[Rollout]:
        """`group_size` completions of each prompt, in the order of prompt, then g.

        `on_finished` gets each as it ends; `check` is called every few tokens and may raise to stop.
        Raises: InvalidRequest for a prompt that leaves no room for its completion.
        """
        if not prompts:
            return []
        capacity = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_completion_tokens
        self._check_room(prompts, sampling)
        rows = self._num_rows(len(prompts) * group_size, group_size, capacity)
        decoding = _Decoding(self._make_engine(rows, capacity), self._tokenizer, sampling, self._policy.device, on_finished)
        waiting = deque(enumerate(prompts))
        steps = 0
        while waiting or decoding.rows:
            if waiting and (decoding.engine.admits_at_any_time or not decoding.rows):
                num_prompts = min(len(waiting), (rows - len(decoding.rows)) // group_size)
                decoding.admit([waiting.popleft() for _ in range(num_prompts)], group_size)
            if steps % CHUNK_TOKENS == 0:
                check()
            decoding.step()
            steps += 1
        return [decoding.finished[place, g] for place in range(len(prompts)) for g in range(group_size)]

    def _make_engine(self, rows: int, capacity: int) -> Engine:
        policy = self._policy
        if self.is_native:
            return NativeEngine(policy.model, policy.head(), self._dtype, rows, capacity)
        return GenericEngine(policy)

    def _num_rows(self, wanted: int, group_size: int, capacity: int) -> int:
        """Rows that decode together: a function of shapes, not of free memory."""
        config = self._policy.model_config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        row_bytes: int = 2 * config.num_hidden_layers * heads * width * capacity * self._dtype.itemsize
        return max(group_size, min(wanted, self._max_rows, CACHE_BYTES // row_bytes))

    def _check_room(self, prompts: list[Prompt], sampling: Sampling) -> None:
        context = getattr(self._policy.model_config.get_text_config(), "max_position_embeddings", None)
        for prompt in prompts:
            if context is not None and len(prompt.token_ids) + sampling.max_completion_tokens > context:
                raise InvalidRequest(
                    f"Row {prompt.index}: {len(prompt.token_ids)} prompt tokens and max_completion_tokens "
                    f"{sampling.max_completion_tokens} are more than the model's context of {context}.",
                    code="prompt_too_long",
                )


class _Decoding:
    """The rows of one `generate` call while they are being sampled."""

    def __init__(
        self, engine: Engine, tokenizer: Any, sampling: Sampling, device: torch.device, on_finished: Callable[[Rollout], None]
    ) -> None:
        self.engine = engine
        self.rows: list[_Row] = []
        self.finished: dict[tuple[int, int], Rollout] = {}
        self._tokenizer, self._sampling, self._device, self._on_finished = tokenizer, sampling, device, on_finished

    def admit(self, prompts: list[tuple[int, Prompt]], group_size: int) -> None:
        """Reads the prompts and samples the first token of each completion."""
        if not prompts:
            return
        logits = self.engine.admit([prompt.token_ids for _, prompt in prompts], group_size)
        new = [
            _Row(prompt, place, g, TextSoFar(self._tokenizer, self._sampling.stop)) for place, prompt in prompts for g in range(group_size)
        ]
        self._extend(new, logits)
        self.rows += new
        self._retire()

    def step(self) -> None:
        """Samples one more token of every row."""
        if not self.rows:
            return
        last = torch.tensor([row.token_ids[-1] for row in self.rows], device=self._device)
        self._extend(self.rows, self.engine.step(last))
        self._retire()

    def _extend(self, rows: list[_Row], logits: Tensor) -> None:
        sampling = self._sampling
        kept = sampling.kept_tokens(logits) if sampling.is_restricted else None
        tokens, logprobs = sample_tokens(logits, sampling.temperature, self._uniforms(rows), kept)
        # Together, because each copy from a GPU waits for it.
        for row, token, logprob in zip(rows, *torch.stack([tokens.double(), logprobs.double()]).tolist(), strict=True):
            row.token_ids.append(int(token))
            row.logprobs.append(logprob)
        if kept is not None:
            for row, ids in zip(rows, kept_ids(kept), strict=True):
                row.kept.append(ids)

    def _uniforms(self, rows: list[_Row]) -> Tensor:
        """The number of the next token of each row. [b] float64."""
        sampling = self._sampling
        due = [row for row in rows if len(row.token_ids) % UNIFORMS_AHEAD == 0]
        if due:
            prompts, gs, lengths = np.array([(row.prompt.index, row.g, len(row.token_ids)) for row in due]).T[:, :, None]
            ahead = uniforms(
                sampling.seed, sampling.purpose, sampling.step, sampling.round_, prompts, gs, lengths + np.arange(UNIFORMS_AHEAD)
            )
            for row, numbers in zip(due, ahead.tolist(), strict=True):
                row.uniforms = numbers
        return torch.tensor([row.uniforms[len(row.token_ids) % UNIFORMS_AHEAD] for row in rows], dtype=torch.float64)

    def _retire(self) -> None:
        """Takes out the rows that ended; the last rows move into their places."""
        ended = [self._finish(row) for row in self.rows]
        order = fill_holes(ended)
        if len(order) < len(self.rows):
            self.rows = [self.rows[source] for source in order]
            self.engine.keep(order)

    def _finish(self, row: _Row) -> bool:
        """Whether `row` has ended; if so it is handed over."""
        ends = row.token_ids[-1] in self._sampling.end_token_ids
        text = row.text.stopped_text(row.token_ids) if not ends else row.text.text(row.token_ids[:-1])
        if text is None and len(row.token_ids) < self._sampling.max_completion_tokens:
            return False
        reason = "length" if text is None else "stop"
        whole = row.text.text(row.token_ids) if text is None else text
        support = Support.of(row.kept) if row.kept else None
        rollout = Rollout(row.prompt, row.g, tuple(row.token_ids), tuple(row.logprobs), reason, whole, support)
        self.finished[row.place, row.g] = rollout
        self._on_finished(rollout)
        return True


def fill_holes(ended: list[bool]) -> list[int]:
    """For each row that stays, in its new place, its old one: rows from the end move into the places of those that ended."""
    count = ended.count(False)
    movers = iter([row for row in range(len(ended) - 1, count - 1, -1) if not ended[row]])
    return [next(movers) if ended[row] else row for row in range(count)]

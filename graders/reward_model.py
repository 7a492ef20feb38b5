"""A sequence-classification model that grades, in the trainer's own process. The only file of this room that needs torch: import it lazily.

Samples that wait are scored together, in float32. What a model cannot read whole is not graded.
"""

import asyncio
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from core.errors import InvalidRequest
from core.folders import folder_digest
from core.grader_specs import PinnedRewardModelGrader
from graders.grade import Grade, GradeFailure, GradeRequest, failed
from graders.template import InvalidVariable, render, ungradable

MAX_BATCH = 32
DECIMALS = 4
"""Of the reward: the digits behind depend on which samples were scored together."""


@dataclass(frozen=True)
class Waiting:
    token_ids: list[int]
    reward: "asyncio.Future[float]"


def load_reward_model(spec: PinnedRewardModelGrader) -> "RewardModel":
    """Raises: InvalidRequest where the files changed since the job was submitted, are no such model, or have no such label."""
    folder = Path(spec.folder).resolve()
    if spec.digest and folder_digest(folder) != spec.digest:
        message = f"The files of reward model '{spec.model}' have changed since the job was submitted."
        raise InvalidRequest(message, code="model_changed", param="grader.model")
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"'{spec.model}' is no sequence-classification model: {error}", param="grader.model") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise InvalidRequest(f"'{spec.model}' is no sequence-classification model: it has no {missing}.", param="grader.model")
    if not isinstance(spec.input, str) and tokenizer.chat_template is None:
        raise InvalidRequest(f"'{spec.model}' has no chat template: 'input' must be a text.", param="grader.input")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return RewardModel(spec, model.to(device).eval(), tokenizer, _label_index(spec, model.config.id2label))


def _label_index(spec: PinnedRewardModelGrader, labels: dict[int, str]) -> int | None:
    """None for the logit of a model with one label."""
    if spec.label is None:
        if len(labels) == 1:
            return None
        raise InvalidRequest(f"'{spec.model}' has {len(labels)} labels; name one of {_shown(labels)}.", param="grader.label")
    if len(labels) == 1:
        raise InvalidRequest(f"'{spec.model}' has one label, whose logit is the reward; leave 'label' out.", param="grader.label")
    for index, label in labels.items():
        if label == spec.label:
            return int(index)
    raise InvalidRequest(f"'{spec.model}' has no label '{spec.label}', but {_shown(labels)}.", param="grader.label")


def _shown(labels: dict[int, str]) -> str:
    return ", ".join(f"'{label}'" for label in list(labels.values())[:10])


class RewardModel:
    """Belongs to the event loop in which it is first used; computes in a thread of its own."""

    def __init__(self, spec: PinnedRewardModelGrader, model: Any, tokenizer: Any, label_index: int | None) -> None:
        self._spec = spec
        self._model = model
        self._tokenizer = tokenizer
        self._label_index = label_index
        self._pad = _padding(model, tokenizer)
        self._longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self._waiting: list[Waiting] = []
        self._work: asyncio.Task[None] | None = None

    async def grade(self, request: GradeRequest) -> Grade:
        started = time.monotonic()
        return replace(await self._grade(request), latency_seconds=time.monotonic() - started)

    async def close(self) -> None:
        if self._work is not None:
            self._work.cancel()
            await asyncio.gather(self._work, return_exceptions=True)

    async def _grade(self, request: GradeRequest) -> Grade:
        try:
            token_ids = self._tokens(request)
        except InvalidVariable as error:
            return ungradable(error)
        if not 0 < len(token_ids) <= self._longest:
            return failed(GradeFailure.REQUEST_INVALID, f"The text has {len(token_ids)} tokens; the model reads 1 to {self._longest}.")
        waiting = Waiting(token_ids, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._score_all())
        reward = await waiting.reward
        if reward != reward or abs(reward) == float("inf"):
            return failed(GradeFailure.INVALID_SCORE, "The model's output is not finite.")
        return Grade(round(reward, DECIMALS))

    def _tokens(self, request: GradeRequest) -> list[int]:
        """Raises: InvalidVariable."""
        spec_input, sample = self._spec.input, request.sample
        if isinstance(spec_input, str):
            return list(self._tokenizer(render(spec_input, request.item, sample))["input_ids"])
        messages = [{"role": part.role, "content": render(part.content, request.item, sample)} for part in spec_input]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _score_all(self) -> None:
        """Batch after batch, the longest texts first, until nobody waits. What comes meanwhile is in the next batch."""
        while self._waiting:
            await asyncio.sleep(0)
            self._waiting.sort(key=lambda waiting: len(waiting.token_ids), reverse=True)
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
            try:
                rewards = await asyncio.to_thread(self._score, [waiting.token_ids for waiting in batch])
            except BaseException as error:
                for waiting in batch:
                    if not waiting.reward.done():
                        waiting.reward.set_exception(error)
                raise
            for waiting, reward in zip(batch, rewards, strict=True):
                if not waiting.reward.done():
                    waiting.reward.set_result(reward)

    @torch.inference_mode()
    def _score(self, rows: list[list[int]]) -> list[float]:
        """[B] rewards; rows are padded on the right."""
        longest = max(map(len, rows))
        token_ids = torch.tensor([row + [self._pad] * (longest - len(row)) for row in rows], device=self._model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._model.device)
        logits = self._model(input_ids=token_ids, attention_mask=mask).logits.float()
        values = logits[:, 0] if self._label_index is None else logits.softmax(-1)[:, self._label_index]
        return [float(value) for value in values.tolist()]


def _padding(model: Any, tokenizer: Any) -> int:
    """The token that fills up rows; decoders find the end of a row by it, so the model must know it too."""
    config = model.config.get_text_config()
    known = [config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0]
    pad = next(int(token) for token in known if token is not None)
    config.pad_token_id = pad
    model.config.pad_token_id = pad
    return pad

"""The wire formats of an endpoint: what is sent about the completions of one call, and how the answer is read."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from core.redaction import Redactor
from graders.grade import Grade, GradeRequest
from graders.reply import Range, parse_reply, parse_results, parse_rewards

BATCH_SIZE = 16
LABEL_KEYS = ("label", "answer", "reference_answer")
"""Of a row: the first that it has is its label in the format `openrlhf`."""


@dataclass(frozen=True)
class Asked:
    """One completion to grade and its name: the same in every call that asks about it."""

    id: str
    request: GradeRequest


@dataclass(frozen=True)
class WireFormat:
    batch_size: int
    """Most completions in one call, where the grader does not say."""

    payload: Callable[[list[Asked]], dict[str, Any]]
    read: Callable[[bytes, list[str], Range, Redactor], list[Grade]]
    """The grades of these ids, in their order."""


def call_name(asked: list[Asked]) -> str:
    """Names a call by what it asks about: a call that is made again has the same name and the same content."""
    if len(asked) == 1:
        return asked[0].id
    return hashlib.sha256("\n".join(one.id for one in asked).encode()).hexdigest()


def _single(asked: list[Asked]) -> dict[str, Any]:
    (one,) = asked
    trace_id = one.request.trace_id or f"trace_{one.id[:32]}"
    return {"sample": one.request.sample, "item": one.request.item, "trace_id": trace_id, "metadata": one.request.metadata}


def _batch(asked: list[Asked]) -> dict[str, Any]:
    samples = [{"id": one.id, "sample": one.request.sample, "item": one.request.item} for one in asked]
    first = asked[0].request.metadata
    shared = {key: value for key, value in first.items() if all(one.request.metadata.get(key) == value for one in asked)}
    return {"samples": samples, "trace_id": f"trace_{call_name(asked)[:32]}", "metadata": shared}


def _openrlhf(asked: list[Asked]) -> dict[str, Any]:
    prompts = [_prompt(one.request.item) for one in asked]
    return {
        "query": [prompt + one.request.output_text for prompt, one in zip(prompts, asked, strict=True)],
        "prompts": prompts,
        "labels": [next((one.request.item[key] for key in LABEL_KEYS if key in one.request.item), None) for one in asked],
    }


def _prompt(item: dict[str, Any]) -> str:
    """The texts of the row's messages, a line break after each. No chat template: that is the model's, and unknown here."""
    messages = item.get("messages")
    contents = [message.get("content") for message in messages if isinstance(message, dict)] if isinstance(messages, list) else []
    return "".join(f"{content}\n" for content in contents if isinstance(content, str))


def _read_single(body: bytes, ids: list[str], reward_range: Range, redactor: Redactor) -> list[Grade]:
    return [parse_reply(body, reward_range, redactor)]


FORMATS = {
    "single": WireFormat(1, _single, _read_single),
    "batch": WireFormat(BATCH_SIZE, _batch, parse_results),
    "openrlhf": WireFormat(BATCH_SIZE, _openrlhf, parse_rewards),
}

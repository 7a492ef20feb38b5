"""What a judge wrote, as a result: strict, because a verdict that was guessed would be trained on.

A judge is asked for {"steps": [{"description", "conclusion"}], "result": ...}. Where its server cannot hold it to that,
the one such object in its text counts, or a text that is nothing but the result.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from core.errors import InvalidGrade

MAX_TEXT_CHARACTERS = 65_536
END_OF_THOUGHT = "</think>"
USAGE = ("prompt_tokens", "completion_tokens", "total_tokens")


@dataclass(frozen=True)
class Completion:
    """The first choice of a chat completion."""

    text: str
    refusal: str | None
    is_cut_off: bool
    token_usage: dict[str, int]
    """Empty where the server does not count."""


@dataclass(frozen=True)
class Result:
    value: Any
    steps: str | None = None
    """The judge's reasons, a line each."""


def parse_completion(body: bytes) -> Completion:
    """Raises: InvalidGrade when `body` is no chat completion."""
    try:
        reply = json.loads(body)
        (choice, *_) = reply["choices"]
        message = choice["message"]
        content, refusal = message.get("content"), message.get("refusal")
        finish_reason = choice.get("finish_reason")
        usage = _usage(reply.get("usage"))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidGrade("The answer is not a chat completion.") from error
    if finish_reason == "content_filter":
        refusal = refusal or "The server's filter withheld the answer."
    return Completion(_text(content), refusal if isinstance(refusal, str) and refusal else None, finish_reason == "length", usage)


def find_result(text: str) -> Result:
    """Raises: InvalidGrade when there are several results that differ. Without an object, the text itself is the result."""
    text = text.rpartition(END_OF_THOUGHT)[2][-MAX_TEXT_CHARACTERS:].strip()
    found = [value for value in _objects(text) if "result" in value]
    if any(value["result"] != found[0]["result"] for value in found[1:]):
        raise InvalidGrade("The judge gave several results that differ.")
    if found:
        return Result(found[-1]["result"], _steps(found[-1].get("steps")))
    try:
        return Result(json.loads(text))
    except (ValueError, RecursionError):
        return Result(text)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in `text`, whatever stands around them."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            end = start + 1
        else:
            yield value
        start = text.find("{", end)


def _text(content: Any) -> str:
    """Some servers answer with parts, of which those of type `text` are the answer."""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _steps(steps: Any) -> str | None:
    if not isinstance(steps, list):
        return None
    pairs = [(step.get("description"), step.get("conclusion")) for step in steps if isinstance(step, dict)]
    lines = [": ".join(part for part in pair if isinstance(part, str)) for pair in pairs]
    return "\n".join(line for line in lines if line) or None


def _usage(usage: Any) -> dict[str, int]:
    if not isinstance(usage, dict):
        return {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return {**{name: _count(usage.get(name)) for name in USAGE}, "cached_tokens": _count(cached)}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0

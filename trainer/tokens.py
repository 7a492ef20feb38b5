"""Between text and tokens: the chat template, the tokens that end an answer, and the text of a completion as it grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from transformers import AutoTokenizer

from core.errors import InvalidRequest, boundary

_SAMPLING_DEFAULTS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "presence_penalty",
    "frequency_penalty",
    "bad_words_ids",
    "suppress_tokens",
)
PROBE = "qxzjk"
"""An answer that no template writes by itself."""


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises: InvalidRequest where there is none, or none with a chat template."""
    with boundary(InvalidRequest, "tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        raise InvalidRequest("The model's tokenizer has no chat template.", code="model_without_chat_template", param="model")
    return tokenizer


def end_token_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Every token that ends an answer: of the generation config, of the tokenizer and the one behind a turn in the chat template."""
    configured = getattr(generation_config, "eos_token_id", None)
    configured = [configured] if isinstance(configured, int) else configured or []
    ends = {*configured, _turn_end(tokenizer)}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return frozenset(token for token in ends if token is not None)


def _turn_end(tokenizer: Any) -> int | None:
    """The special token that follows an assistant's message directly, if the template writes one."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
    text: str = _apply(tokenizer, turns, add_generation_prompt=False)
    if PROBE not in text:
        return None
    ids: list[int] = tokenizer(text.rpartition(PROBE)[2], add_special_tokens=False).input_ids
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


def ignored_sampling_defaults(generation_config: Any) -> dict[str, Any]:
    """What the model's generation config sets for sampling and training does not follow, for the event that says so."""
    plain: dict[str, Any] = generation_config.to_diff_dict() if generation_config is not None else {}
    return {name: plain[name] for name in _SAMPLING_DEFAULTS if plain.get(name) is not None}


def render_prompt(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], *, reasoning_effort: str = "default"
) -> tuple[str, tuple[int, ...]]:
    """(text, token ids) of `messages` up to where the answer begins. `developer` becomes `system`; a template that
    refuses a system message gets it in front of the first user message.

    Raises: InvalidRequest where the template cannot render the messages or has no such effort.
    """
    text = _render(tokenizer, messages, reasoning_effort, add_generation_prompt=True)
    return text, encode(tokenizer, text)


def render_answered(tokenizer: Any, messages: Sequence[Mapping[str, Any]], answer: str, *, reasoning_effort: str = "default") -> str:
    """Text of `messages` and the assistant's whole `answer` to them. Raises: InvalidRequest."""
    turns = [*messages, {"role": "assistant", "content": answer}]
    return _render(tokenizer, turns, reasoning_effort, add_generation_prompt=False)


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of text that a template has rendered: nothing is added to it."""
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def _render(tokenizer: Any, messages: Sequence[Mapping[str, Any]], reasoning_effort: str, *, add_generation_prompt: bool) -> str:
    turns = [{**message, "role": "system" if message["role"] == "developer" else message["role"]} for message in messages]
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt}
    if reasoning_effort != "default":
        _check_effort(tokenizer)
        options["reasoning_effort"] = reasoning_effort
    try:
        return _apply(tokenizer, turns, **options)
    except InvalidRequest:
        if not any(turn["role"] == "system" for turn in turns):
            raise
        return _apply(tokenizer, _without_system(turns), **options)


def _check_effort(tokenizer: Any) -> None:
    variables = jinja2.meta.find_undeclared_variables(jinja2.Environment().parse(tokenizer.chat_template))
    if "reasoning_effort" not in variables:
        raise InvalidRequest("The model's chat template knows no reasoning effort; leave it at 'default'.", param="reasoning_effort")


def _apply(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
        raise InvalidRequest(f"The model's chat template refuses these messages: {error}.", param="messages") from error
    return text


def _without_system(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """System messages joined in front of the first user message."""
    system = [turn["content"] for turn in turns if turn["role"] == "system"]
    others = [dict(turn) for turn in turns if turn["role"] != "system"]
    for turn in others:
        if turn["role"] == "user":
            turn["content"] = "\n\n".join([*system, turn["content"]])
            break
    return others


class TextSoFar:
    """The text of one growing completion, watched for stop strings without decoding all of it at every token."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._window = 4 * max((len(text) for text in stop), default=0) + 8

    def text(self, token_ids: list[int]) -> str:
        """The answer as the grader sees it."""
        decoded: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded

    def stopped_text(self, token_ids: list[int]) -> str | None:
        """The text before the first stop string; None while there is none."""
        if not self._stop:
            return None
        tail = self.text(token_ids[-self._window :])
        if not any(stop in tail for stop in self._stop):
            return None
        whole = self.text(token_ids)
        places = [place for place in (whole.find(stop) for stop in self._stop) if place >= 0]
        return whole[: min(places)] if places else None

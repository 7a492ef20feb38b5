"""A language model as grader: an OpenAI-compatible judge by URL and key, asked for a number or for a label.

The key is a header like any other secret. A judge that refuses, rambles or leaves its range gives no grade.
"""

import json
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from core.errors import InvalidGrade
from core.grader_specs import PinnedJudgeGrader, PinnedLabelModelGrader, PinnedScoreModelGrader
from core.judge_specs import AudioPart, ImagePart, JudgeMessage, TextPart
from core.redaction import Redactor, secret_values
from graders.calls import Request, RetryPolicy, Service, common_headers, message_id
from graders.grade import MAX_EXPLANATION_CHARACTERS, Grade, GradeFailure, GradeRequest, failed, shorten
from graders.judge_reply import Completion, find_result, parse_completion
from graders.limits import MakeLimiter, local_limiter
from graders.reply import finite_number
from graders.template import InvalidVariable, render, ungradable
from outbound.safe_http import NetworkPolicy

SCHEMA_REFUSALS = frozenset({400, 422})
"""What servers answer to a `response_format` that they do not have."""


@dataclass(frozen=True)
class Scale:
    """What a judge may answer, and which reward that is."""

    schema: dict[str, Any]
    """JSON schema of `result`."""

    wanted: str
    """The same in words, for judges whose server cannot hold them to a schema."""

    worst: float
    reward: Callable[[Any], Grade]
    """The grade of a result, failed where it lies outside the range. Raises: InvalidGrade for what is no result at all."""


def number_scale(spec: PinnedScoreModelGrader) -> Scale:
    low, high = spec.range

    def reward(result: Any) -> Grade:
        number = finite_number(result, "result")
        if not low <= number <= high:
            return failed(GradeFailure.OUT_OF_RANGE, f"'result' is {number:g}, outside the range {low:g} to {high:g}.")
        return Grade(number)

    return Scale({"type": "number"}, f"a number from {low:g} to {high:g}", low, reward)


def label_scale(spec: PinnedLabelModelGrader) -> Scale:
    wanted = "one of the labels " + ", ".join(json.dumps(label, ensure_ascii=False) for label in spec.labels)

    def reward(result: Any) -> Grade:
        label = result if isinstance(result, str) else json.dumps(result)
        if label not in spec.labels:
            raise InvalidGrade(f"'result' must be {wanted}.")
        return Grade(1.0 if label in spec.passing_labels else 0.0, explanation=label)

    return Scale({"type": "string", "enum": spec.labels}, wanted, 0.0, reward)


class ModelJudge:
    """Belongs to the event loop in which it is first used."""

    def __init__(
        self,
        spec: PinnedJudgeGrader,
        scale: Scale,
        *,
        headers: Mapping[str, str],
        network: NetworkPolicy,
        retry: RetryPolicy | None = None,
        make_limiter: MakeLimiter = local_limiter,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._spec = spec
        self._scale = scale
        self._headers = dict(headers)
        self._redactor = Redactor(secret_values({"judge": {"headers": headers}}))
        url = spec.base_url.rstrip("/") + "/chat/completions"
        self._service = Service(url, spec, self._redactor, network, retry=retry, make_limiter=make_limiter, ssl_context=ssl_context)
        self._takes_schema = True

    async def grade(self, request: GradeRequest) -> Grade:
        try:
            messages = [_message(message, request) for message in self._spec.input]
        except InvalidVariable as error:
            return ungradable(error, self._scale.worst)
        body = {"model": self._spec.model, "messages": _with_instruction(messages, self._scale), **self._sampling()}
        return replace(await self._ask(message_id(request.idempotency_key), body), model=self._spec.model)

    async def close(self) -> None:
        await self._service.close()

    def _sampling(self) -> dict[str, Any]:
        sampling = self._spec.sampling_params.model_dump(exclude_none=True)
        if "max_completions_tokens" in sampling:
            sampling["max_completion_tokens"] = sampling.pop("max_completions_tokens")
        return sampling

    async def _ask(self, name: str, body: dict[str, Any]) -> Grade:
        """Asks with a schema, and without one where the server refuses that; a server that did so is not sent one again."""
        plain = self._request(f"{name}.plain", body)
        if not self._takes_schema:
            return (await self._service.ask(plain)).grade
        refused = await self._service.ask(self._request(name, {**body, "response_format": _response_format(self._scale)}))
        if refused.status not in SCHEMA_REFUSALS:
            return refused.grade
        verdict = await self._service.ask(plain, self._service.deadline_seconds - refused.grade.latency_seconds)
        if verdict.status in range(200, 300):
            self._takes_schema = False
        return replace(
            verdict.grade,
            attempts=refused.grade.attempts + verdict.grade.attempts,
            latency_seconds=refused.grade.latency_seconds + verdict.grade.latency_seconds,
        )

    def _request(self, name: str, body: dict[str, Any]) -> Request:
        return Request(json.dumps(body).encode(), lambda: {**self._headers, **common_headers(name)}, self._read)

    def _read(self, body: bytes) -> list[Grade]:
        try:
            completion = parse_completion(body)
        except InvalidGrade as error:
            return [failed(GradeFailure.INVALID_JSON, error.message)]
        usage = {self._spec.model: completion.token_usage} if completion.token_usage else {}
        return [replace(self._verdict(completion), token_usage=usage)]

    def _verdict(self, completion: Completion) -> Grade:
        if completion.refusal is not None:
            return failed(GradeFailure.MODEL_REFUSAL, f"The judge refused: {self._excerpt(completion.refusal)}")
        try:
            result = find_result(completion.text)
            grade = self._scale.reward(result.value)
        except InvalidGrade as error:
            cut = " It was cut off; a larger 'max_completions_tokens' may help." if completion.is_cut_off else ""
            return failed(GradeFailure.MODEL_PARSE, f"{error.message}{cut} The judge wrote: {self._excerpt(completion.text)}")
        reasons = [text for text in (grade.explanation, result.steps) if text]
        explanation = shorten(self._redactor.clean("\n".join(reasons)), MAX_EXPLANATION_CHARACTERS) if reasons else None
        return replace(grade, explanation=explanation)

    def _excerpt(self, text: str) -> str:
        return repr(shorten(self._redactor.clean(text), 200))


def _message(message: JudgeMessage, request: GradeRequest) -> dict[str, Any]:
    """In the form of chat completions, filled in. Raises: InvalidVariable."""
    role = "system" if message.role == "developer" else message.role
    parts = [_part(part, request) for part in message.content]
    return {"role": role, "content": parts[0]["text"] if len(parts) == 1 and "text" in parts[0] else parts}


def _part(part: TextPart | ImagePart | AudioPart, request: GradeRequest) -> dict[str, Any]:
    def filled(template: str) -> str:
        return render(template, request.item, request.sample)

    match part:
        case TextPart():
            return {"type": "text", "text": filled(part.text)}
        case ImagePart():
            return {"type": "image_url", "image_url": {"url": filled(part.image_url), "detail": part.detail}}
        case AudioPart():
            return {"type": "input_audio", "input_audio": {"data": filled(part.input_audio.data), "format": part.input_audio.format}}


def _with_instruction(messages: list[dict[str, Any]], scale: Scale) -> list[dict[str, Any]]:
    """`messages` with the form of the answer at their end: in the last user's, since some models want roles to alternate."""
    example = '{"steps": [{"description": "...", "conclusion": "..."}], "result": ...}'
    instruction = f"Answer with one JSON object and nothing else: {example} where 'result' is {scale.wanted}."
    *others, last = messages
    if last["role"] != "user":
        return [*messages, {"role": "user", "content": instruction}]
    content = last["content"]
    longer = f"{content}\n\n{instruction}" if isinstance(content, str) else [*content, {"type": "text", "text": instruction}]
    return [*others, {**last, "content": longer}]


def _response_format(scale: Scale) -> dict[str, Any]:
    step = _closed_object({"description": {"type": "string"}, "conclusion": {"type": "string"}})
    schema = _closed_object({"steps": {"type": "array", "items": step}, "result": scale.schema})
    return {"type": "json_schema", "json_schema": {"name": "grade", "strict": True, "schema": schema}}


def _closed_object(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}

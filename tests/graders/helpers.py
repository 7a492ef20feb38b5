"""What the grader tests share."""

import asyncio
import json
from typing import Any

from core.grader_specs import PinnedEndpointGrader, PinnedScoreModelGrader
from graders.calls import RetryPolicy
from graders.endpoint import EndpointGrader
from graders.grade import Grade, Grader, GradeRequest
from graders.limits import MakeLimiter, local_limiter
from graders.model_judge import ModelJudge, number_scale
from outbound.safe_http import NetworkPolicy
from outbound.signing import generate_secret
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Reply, answer

SECRET = generate_secret()
FAST = RetryPolicy(base_seconds=0.01, cap_seconds=0.02)


def request(output_text: str = "4", **changes: Any) -> GradeRequest:
    defaults: dict[str, Any] = {
        "item": {"answer": "4"},
        "trace_id": "trace_1",
        "idempotency_key": "k" * 64,
        "metadata": {"job_id": "ftjob-1"},
    }
    return GradeRequest(output_text=output_text, **{**defaults, **changes})


def endpoint_spec(url: str, **options: Any) -> PinnedEndpointGrader:
    fixed = {"type": "endpoint", "secret_ref": "grader_a@1", "grader_version": "grader_a@1", "timeout_seconds": 5.0}
    return PinnedEndpointGrader(**{**fixed, "url": url, **options})


def endpoint_grader(
    endpoint: FakeEndpoint | str,
    *,
    headers: dict[str, str] | None = None,
    signing_secret: str | None = SECRET,
    network: NetworkPolicy | None = None,
    retry: RetryPolicy = FAST,
    more_secrets: dict[str, Any] | None = None,
    make_limiter: MakeLimiter = local_limiter,
    **options: Any,
) -> EndpointGrader:
    spec = endpoint_spec(endpoint if isinstance(endpoint, str) else endpoint.url, **options)
    policy = network or NetworkPolicy(LOOPBACK)
    secret = {"headers": headers or {}, "signing_secret": signing_secret, **(more_secrets or {})}
    return EndpointGrader(spec, secret, network=policy, retry=retry, make_limiter=make_limiter)


async def grade_all(grader: Grader, *requests: GradeRequest) -> list[Grade]:
    try:
        return list(await asyncio.gather(*(grader.grade(each) for each in requests)))
    finally:
        await grader.close()


def grade(grader: Grader, one: GradeRequest | None = None) -> Grade:
    return asyncio.run(grade_all(grader, one or request()))[0]


def completion(content: str | None, **message: Any) -> Reply:
    """A judge's answer that holds `content`."""
    usage = {"prompt_tokens": 30, "completion_tokens": 5, "total_tokens": 35, "prompt_tokens_details": {"cached_tokens": 20}}
    choice = {
        "index": 0,
        "finish_reason": message.pop("finish_reason", "stop"),
        "message": {"role": "assistant", "content": content, **message},
    }
    return answer({"object": "chat.completion", "choices": [choice], "usage": usage})


def verdict(result: Any, *steps: str) -> Reply:
    """A judge's answer as the schema wants it."""
    return completion(json.dumps({"steps": [{"description": "step", "conclusion": step} for step in steps], "result": result}))


def base_url(endpoint: FakeEndpoint) -> str:
    return f"http://localhost:{endpoint.port}/v1"


def judge_spec(url: str, **options: Any) -> PinnedScoreModelGrader:
    fixed = {"type": "score_model", "secret_ref": "inline", "model": "judge-1", "timeout_seconds": 5.0}
    messages = [{"role": "user", "content": "Grade {{ sample.output_text }} against {{ item.answer }}."}]
    return PinnedScoreModelGrader.model_validate({**fixed, "base_url": url, "input": messages, **options})


def judge(
    endpoint: FakeEndpoint | str,
    *,
    key: str | None = "sk-judge-key",
    network: NetworkPolicy | None = None,
    retry: RetryPolicy = FAST,
    **options: Any,
) -> ModelJudge:
    spec = judge_spec(endpoint if isinstance(endpoint, str) else base_url(endpoint), **options)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return ModelJudge(spec, number_scale(spec), headers=headers, network=network or NetworkPolicy(LOOPBACK), retry=retry)

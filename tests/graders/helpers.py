"""What the grader tests share."""

import asyncio
from typing import Any

from core.grader_specs import PinnedEndpointGrader
from graders.calls import RetryPolicy
from graders.endpoint import EndpointGrader
from graders.grade import Grade, Grader, GradeRequest
from outbound.safe_http import NetworkPolicy
from outbound.signing import generate_secret
from tests.fake_endpoint import LOOPBACK, FakeEndpoint

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
    **options: Any,
) -> EndpointGrader:
    spec = endpoint_spec(endpoint if isinstance(endpoint, str) else endpoint.url, **options)
    policy = network or NetworkPolicy(LOOPBACK)
    return EndpointGrader(spec, headers=headers or {}, signing_secret=signing_secret, network=policy, retry=retry)


async def grade_all(grader: Grader, *requests: GradeRequest) -> list[Grade]:
    try:
        return list(await asyncio.gather(*(grader.grade(each) for each in requests)))
    finally:
        await grader.close()


def grade(grader: Grader, one: GradeRequest | None = None) -> Grade:
    return asyncio.run(grade_all(grader, one or request()))[0]

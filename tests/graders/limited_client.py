"""One job's process for the tests of limits: grades what it is told on stdin, and prints how many grades it got."""

import asyncio
import json
import sys
from typing import Any

from core.grader_specs import PinnedEndpointGrader
from graders.calls import RetryPolicy
from graders.endpoint import EndpointGrader
from graders.grade import GradeRequest
from graders.shared_limits import SharedLimits
from outbound.safe_http import NetworkPolicy


async def grade_all(broker_url: str, url: str, owner: str, count: int, timing: dict[str, float], options: dict[str, Any]) -> int:
    spec = PinnedEndpointGrader(type="endpoint", url=url, secret_ref="inline", grader_version="inline", **options)
    limits = SharedLimits(broker_url, "project", owner, **timing)
    grader = EndpointGrader(spec, {}, network=NetworkPolicy(("127.0.0.0/8",)), retry=RetryPolicy(base_seconds=0.01), make_limiter=limits)
    requests = [GradeRequest(item={}, output_text="4", idempotency_key=f"{owner}-{number}") for number in range(count)]
    try:
        grades = await asyncio.gather(*(grader.grade(request) for request in requests))
    finally:
        await grader.close()
    return sum(grade.reward == 1.0 and grade.attempts == 1 for grade in grades)


if __name__ == "__main__":
    print(asyncio.run(grade_all(**json.load(sys.stdin))))

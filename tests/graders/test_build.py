import asyncio
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.errors import GraderError
from core.grader_specs import PinnedGraderSpec
from graders.build import build_grader
from outbound.safe_http import NetworkPolicy
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, score
from tests.graders.helpers import SECRET, grade, request

PINNED: TypeAdapter[PinnedGraderSpec] = TypeAdapter(PinnedGraderSpec)
LOCAL = NetworkPolicy(LOOPBACK)


def pinned(raw: dict[str, Any]) -> PinnedGraderSpec:
    return PINNED.validate_python(raw)


STRING_CHECK = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}
PYTHON = {"type": "python", "source": "def grade(sample, item):\n    return float(item['answer']) / 8"}


@pytest.mark.parametrize(("raw", "reward"), [(STRING_CHECK, 1.0), (PYTHON, 0.5)])
def test_each_kind_is_built_and_grades(raw: dict[str, Any], reward: float) -> None:
    assert grade(build_grader(pinned(raw), {}, LOCAL)).reward == reward


def test_a_whole_multi_grader_with_every_kind_of_member() -> None:
    with FakeEndpoint([score(0.25)]) as endpoint:
        remote = {"type": "endpoint", "url": endpoint.url, "secret_ref": "s", "grader_version": "inline"}
        raw = {"type": "multi", "graders": {"a": STRING_CHECK, "b": PYTHON, "c": remote}, "calculate_output": "a + b + c"}
        secrets = {"s": {"headers": {"x-key": "value"}, "signing_secret": SECRET}}
        result = grade(build_grader(pinned(raw), secrets, LOCAL), request())
        assert result.reward == 1.75
        assert result.sub_scores == {"a": 1.0, "b": 0.5, "c": 0.25}
        assert endpoint.requests[0].headers["x-key"] == "value"
        assert "webhook-signature" in endpoint.requests[0].headers


def test_endpoint_without_its_secrets_is_refused() -> None:
    raw = {"type": "endpoint", "url": "https://example.com/", "secret_ref": "grader_a@1", "grader_version": "grader_a@1"}
    with pytest.raises(GraderError, match="grader_a@1"):
        build_grader(pinned(raw), {}, LOCAL)


def test_a_grader_that_was_never_used_can_be_closed() -> None:
    remote = {"type": "endpoint", "url": "https://example.com/", "secret_ref": "s", "grader_version": "inline"}
    for raw in (STRING_CHECK, PYTHON, remote):
        asyncio.run(build_grader(pinned(raw), {"s": {}}, LOCAL).close())

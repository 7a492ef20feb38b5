import asyncio
from typing import Any

import pytest
from pydantic import TypeAdapter

from core.errors import GraderError
from core.grader_specs import PinnedGraderSpec
from graders.build import build_grader
from outbound.safe_http import NetworkPolicy
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, score
from tests.graders.helpers import SECRET, base_url, grade, request, verdict

PINNED: TypeAdapter[PinnedGraderSpec] = TypeAdapter(PinnedGraderSpec)
LOCAL = NetworkPolicy(LOOPBACK)


def pinned(raw: dict[str, Any]) -> PinnedGraderSpec:
    return PINNED.validate_python(raw)


STRING_CHECK = {"type": "string_check", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "operation": "eq"}
SIMILAR = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.answer}}", "evaluation_metric": "fuzzy_match"}
JUDGE = {
    "base_url": "https://example.com/v1",
    "model": "judge-1",
    "input": [{"role": "user", "content": "{{sample.output_text}}?"}],
    "secret_ref": "j",
}
SCORE = {**JUDGE, "type": "score_model"}
LABEL = {**JUDGE, "type": "label_model", "labels": ["good", "bad"], "passing_labels": ["good"]}
PYTHON = {"type": "python", "source": "def grade(sample, item):\n    return float(item['answer']) / 8"}


@pytest.mark.parametrize(("raw", "reward"), [(STRING_CHECK, 1.0), (SIMILAR, 1.0), (PYTHON, 0.5)])
def test_each_kind_is_built_and_grades(raw: dict[str, Any], reward: float) -> None:
    assert grade(build_grader(pinned(raw), {}, LOCAL)).reward == reward


def test_a_whole_multi_grader_with_every_kind_of_member() -> None:
    with FakeEndpoint([score(0.25)]) as endpoint, FakeEndpoint([verdict(0.125)]) as scoring, FakeEndpoint([verdict("good")]) as labelling:
        remote = {"type": "endpoint", "url": endpoint.url, "secret_ref": "s", "grader_version": "inline"}
        members = {"a": STRING_CHECK, "b": PYTHON, "c": remote, "d": SIMILAR}
        judges = {"e": {**SCORE, "base_url": base_url(scoring)}, "f": {**LABEL, "base_url": base_url(labelling)}}
        raw = {"type": "multi", "graders": {**members, **judges}, "calculate_output": "a + b + c + d + e + f"}
        judged = {"headers": {"authorization": "Bearer key"}, "signing_secret": None}
        secrets = {"s": {"headers": {"x-key": "value"}, "signing_secret": SECRET}, "j": judged}
        result = grade(build_grader(pinned(raw), secrets, LOCAL), request())
        assert result.reward == 3.875
        assert result.sub_scores == {"a": 1.0, "b": 0.5, "c": 0.25, "d": 1.0, "e": 0.125, "f": 1.0}
        assert [server.requests[0].headers["authorization"] for server in (scoring, labelling)] == ["Bearer key"] * 2
        assert endpoint.requests[0].headers["x-key"] == "value"
        assert "webhook-signature" in endpoint.requests[0].headers


ENDPOINT = {"type": "endpoint", "url": "https://example.com/", "secret_ref": "grader_a@1", "grader_version": "grader_a@1"}


@pytest.mark.parametrize("raw", [ENDPOINT, {**SCORE, "secret_ref": "grader_a@1"}, {**LABEL, "secret_ref": "grader_a@1"}])
def test_grader_without_its_secrets_is_refused(raw: dict[str, Any]) -> None:
    with pytest.raises(GraderError, match="grader_a@1") as caught:
        build_grader(pinned(raw), {}, LOCAL)
    assert caught.value.code == "grader_secret_missing"


def test_a_grader_that_was_never_used_can_be_closed() -> None:
    remote = {"type": "endpoint", "url": "https://example.com/", "secret_ref": "s", "grader_version": "inline"}
    for raw in (STRING_CHECK, SIMILAR, PYTHON, remote, SCORE, LABEL):
        asyncio.run(build_grader(pinned(raw), {"s": {}, "j": {}}, LOCAL).close())

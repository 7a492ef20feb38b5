"""Reward models at every door of the API: they are named, pinned and never run here."""

from typing import Any

import pytest

from database.base_models import get_model
from database.jobs import get_job
from tests.api.platform import BASE_MODEL, STRING_CHECK, Account, Platform, assert_error
from tests.api.test_graders import RUN, VALIDATE

GRADER: dict[str, Any] = {"type": "reward_model", "model": BASE_MODEL, "input": "{{ sample.output_text }}"}
JOBS = "/v1/fine_tuning/jobs"
PARAM = "method.reinforcement.grader"


def pinned(platform: Platform, owner: Account, grader: dict[str, Any]) -> dict[str, Any]:
    job = owner.create_job(grader=grader)
    with platform.database.reading() as session:
        spec: dict[str, Any] = get_job(session, owner.project_id, job["id"]).grader
    return spec


def test_job_pins_the_digest_of_its_reward_model(platform: Platform, owner: Account) -> None:
    messages = [{"role": "user", "content": "{{ item.answer }}"}, {"role": "assistant", "content": "{{ sample.output_text }}"}]
    spec = pinned(platform, owner, {**GRADER, "input": messages, "label": "good", "pass_threshold": 0.5})
    with platform.database.reading() as session:
        digest = get_model(session, owner.project_id, BASE_MODEL).digest
    assert digest
    assert (spec["digest"], spec["model"], spec["label"]) == (digest, BASE_MODEL, "good")
    assert spec["folder"].startswith("reward_models/")
    assert ".." not in spec["folder"]


def test_members_of_multi_are_pinned_too(platform: Platform, owner: Account) -> None:
    multi = {"type": "multi", "graders": {"style": GRADER, "exact": STRING_CHECK}, "calculate_output": "style + exact"}
    assert pinned(platform, owner, multi)["graders"]["style"]["digest"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"model": "nobody/has"}, "model_not_found", "model"),
        ({"model": None}, "invalid_type", "model"),
        ({"input": "{{ sample.nothing }}"}, "invalid_variable_error", "input"),
        ({"input": [{"role": "user", "content": "{{ nothing.x }}"}]}, "invalid_variable_error", "input.0.content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "invalid_value", "input"),
        ({"label": ""}, "invalid_value", "label"),
        ({"digest": "a"}, "unknown_parameter", "digest"),
    ],
)
def test_wrong_reward_model_is_refused_with_its_field(change: dict[str, Any], code: str, param: str, owner: Account) -> None:
    answer = owner.post(JOBS, owner.job_request(grader={**GRADER, **change}))
    body = answer.json()["error"]
    assert (answer.status_code, body["code"]) == (400, code), body
    assert body["param"].startswith(f"{PARAM}.{param}"), body


def test_validate_knows_it_and_run_says_why_it_cannot(owner: Account) -> None:
    assert owner.post(VALIDATE, {"grader": GRADER}).json()["grader"] == GRADER
    multi = {"type": "multi", "graders": {"style": GRADER}, "calculate_output": "style"}
    for grader in (GRADER, multi):
        message = assert_error(owner.post(RUN, {"grader": grader, "model_sample": "x", "item": {}}), 400, "invalid_value", "grader.type")
        assert "worker" in message

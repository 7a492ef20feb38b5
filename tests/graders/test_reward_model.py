"""A tiny random sequence-classification model as grader, against transformers called row by row."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from core.errors import InvalidRequest
from core.folders import folder_digest
from core.grader_specs import PinnedMultiGrader, PinnedRewardModelGrader
from graders.build import build_grader
from graders.grade import Grade
from outbound.safe_http import NetworkPolicy
from tests.graders.helpers import grade, grade_all, request
from tests.tiny import build_tiny_model, build_tiny_reward_model, build_tiny_tokenizer

TEXTS = ["a", "the answer is 4", "no", "x" * 60, "4 4 4", *(f"number {n}" for n in range(45))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reward_model(tmp_path_factory.mktemp("reward") / "one")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_reward_model(tmp_path_factory.mktemp("reward") / "three", labels=("bad", "fair", "good"))


def spec(folder: Path, **changes: Any) -> PinnedRewardModelGrader:
    fixed = {"type": "reward_model", "model": "judge", "input": "{{ sample.output_text }}", "digest": "", "folder": str(folder)}
    return PinnedRewardModelGrader.model_validate({**fixed, **changes})


def grades(pinned: PinnedRewardModelGrader, texts: list[str] = TEXTS) -> list[Grade]:
    async def run() -> list[Grade]:
        return await grade_all(build_grader(pinned, {}, NetworkPolicy()), *map(request, texts))

    return asyncio.run(run())


def row_by_row(folder: Path, texts: list[str] = TEXTS) -> list[torch.Tensor]:
    """[labels] logits of each text alone."""
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval(), build_tiny_tokenizer()
    with torch.no_grad():
        return [model(**tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits[0] for text in texts]


def test_reward_is_the_logit_that_the_model_gives_each_text_alone(folder: Path) -> None:
    expected = [float(logits[0]) for logits in row_by_row(folder)]
    assert len({round(value, 3) for value in expected}) > 30
    assert [grade.reward for grade in grades(spec(folder))] == pytest.approx(expected, abs=1e-4)


def test_reward_is_the_probability_of_the_label(three: Path) -> None:
    expected = [float(logits.softmax(-1)[2]) for logits in row_by_row(three)]
    assert [grade.reward for grade in grades(spec(three, label="good"))] == pytest.approx(expected, abs=1e-4)


def test_samples_that_wait_are_scored_together_and_the_same_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = LlamaForSequenceClassification.forward
    monkeypatch.setattr(
        LlamaForSequenceClassification, "forward", lambda self, **given: (sizes.append(len(given["input_ids"])), forward(self, **given))[1]
    )
    first, second = grades(spec(folder)), grades(spec(folder))
    assert [grade.reward for grade in first] == [grade.reward for grade in second]
    assert sizes == [32, 18] * 2


def test_messages_go_through_the_model_s_chat_template(folder: Path) -> None:
    messages = [{"role": "user", "content": "{{ item.answer }}"}, {"role": "assistant", "content": "{{ sample.output_text }}"}]
    (graded,) = grades(spec(folder, input=messages), ["yes"])
    expected = float(row_by_row(folder, ["<user>4<end><assistant>yes<end>"])[0][0])
    assert graded.reward == pytest.approx(expected, abs=1e-4)


def test_too_long_a_text_is_not_graded_and_holds_up_nobody(folder: Path) -> None:
    long, short = grades(spec(folder), ["a" * 600, "a"])
    assert (long.reward, long.error) == (None, "grader_request_invalid")
    assert "600 tokens" in (long.error_message or "")
    assert short.reward is not None


def test_missing_variable_is_a_failed_grade(folder: Path) -> None:
    (graded,) = grades(spec(folder, input="{{ item.gold }}"), ["a"])
    assert (graded.reward, graded.error) == (None, "invalid_variable_error")


@pytest.mark.parametrize(
    ("labels", "label", "text"),
    [(1, "good", "leave 'label' out"), (3, None, "name one of 'bad', 'fair', 'good'"), (3, "best", "no label 'best'")],
)
def test_label_must_fit_the_model(labels: int, label: str | None, text: str, folder: Path, three: Path) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        build_grader(spec(folder if labels == 1 else three, label=label), {}, NetworkPolicy())
    assert caught.value.param == "grader.label"


def test_files_that_changed_are_refused(folder: Path) -> None:
    assert grade(build_grader(spec(folder, digest=folder_digest(folder)), {}, NetworkPolicy())).error is None
    with pytest.raises(InvalidRequest) as caught:
        build_grader(spec(folder, digest="0" * 64), {}, NetworkPolicy())
    assert caught.value.code == "model_changed"


def test_a_language_model_is_no_reward_model(tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "lm")
    with pytest.raises(InvalidRequest, match="no sequence-classification model: it has no score"):
        build_grader(spec(tmp_path / "lm"), {}, NetworkPolicy())
    with pytest.raises(InvalidRequest, match="no sequence-classification model"):
        build_grader(spec(tmp_path), {}, NetworkPolicy())


def test_multi_may_hold_one(folder: Path) -> None:
    members: Any = {"style": spec(folder), "half": {"type": "python", "source": "def grade(s, i):\n    return 0.5"}}
    multi = PinnedMultiGrader(type="multi", graders=members, calculate_output="style + half")
    expected = float(row_by_row(folder, ["4"])[0][0]) + 0.5
    assert grade(build_grader(multi, {}, NetworkPolicy())).reward == pytest.approx(expected, abs=1e-4)

"""Metrics against numbers worked out by hand from the papers' formulas, and against slow loops of our own."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import InvalidRequest
from core.grader_specs import TextSimilarityGrader as Spec
from core.specs import parse_grader
from graders.text_similarity import MAX_CHARACTERS, METRICS, TextSimilarityGrader, rouge_words
from tests.graders.helpers import grade, request

CONTRACT = ["fuzzy_match", "bleu", "gleu", "meteor", "cosine", *(f"rouge_{n}" for n in range(1, 6)), "rouge_l"]
MAT, IS_MAT = "the cat sat on the mat", "the cat is on the mat"
words = st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=12).map(" ".join)


def similar(metric: Any, text: str, reference: str) -> Any:
    spec = Spec(type="text_similarity", input="{{sample.output_text}}", reference="{{item.answer}}", evaluation_metric=metric)
    return grade(TextSimilarityGrader(spec), request(text, item={"answer": reference}))


@pytest.mark.parametrize(
    ("metric", "text", "reference", "score"),
    [
        # 2 * |longest common subsequence| / (|a| + |b|), over characters: "ittn" of 6 and 7; "ab" of 2 and 4.
        ("fuzzy_match", "kitten", "sitting", 8 / 13),
        ("fuzzy_match", "ab", "xayb", 4 / 6),
        ("fuzzy_match", "abc", "xyz", 0.0),
        # Precisions 5/6, 3/5, 1/4; no 4-gram of three, smoothed to 1/(2 * 3); as long as the reference.
        ("bleu", MAT, IS_MAT, (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25),
        # "the" counts once, as often as the reference has it; three orders without a match halve each time.
        ("bleu", "the the the the", "the cat", (1 / 4 * 1 / (2 * 3) * 1 / (4 * 2) * 1 / (8 * 1)) ** 0.25),
        # Two words have two orders; brevity penalty exp(1 - 3/2).
        ("bleu", "the cat", "the cat sat", math.exp(-0.5)),
        ("bleu", "4", "4", 1.0),
        ("bleu", "x y z", "a b c", 0.0),
        ("bleu", "The cat", "the Cat", 0.0),
        # Matches of 1..4 words: 5 + 3 + 1 + 0 of 6 + 5 + 4 + 3 on either side.
        ("gleu", MAT, IS_MAT, 9 / 18),
        # 1 + 0 matches; 3 n-grams in the text, 18 in the reference: recall is the smaller.
        ("gleu", "the mat", MAT, 3 / 18),
        ("gleu", "the dog", "the cat", 1 / 3),
        # Lin 2004, section 3.1: S2 and S3 against S1 "police killed the gunman".
        ("rouge_l", "police kill the gunman", "police killed the gunman", 3 / 4),
        ("rouge_l", "the gunman kill police", "police killed the gunman", 2 / 4),
        ("rouge_2", "police kill the gunman", "police killed the gunman", 1 / 3),
        ("rouge_2", "the gunman kill police", "police killed the gunman", 1 / 3),
        # Precision 2/2, recall 2/6.
        ("rouge_1", "The MAT!", MAT, 2 * 1 * (1 / 3) / (1 + 1 / 3)),
        ("rouge_3", "a b c d", "a b c e", 1 / 2),
        ("rouge_4", "a b c d", "a b c d e", 2 * 1 / 3),
        ("rouge_5", "a b c d", "a b c d", 0.0),
    ],
)
def test_metric_is_what_its_formula_says(metric: str, text: str, reference: str, score: float) -> None:
    assert similar(metric, text, reference).reward == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_a_text_is_fully_like_itself_and_like_nothing_where_nothing_is_shared(metric: str) -> None:
    text = "One two, three four five six."
    assert similar(metric, text, text).reward == pytest.approx(1.0)
    assert similar(metric, "ab cd ef gh ij", "kl mn op qr st").reward == pytest.approx(0.0, abs=0.35 if metric == "fuzzy_match" else 0.0)
    assert similar(metric, "", "some words").reward == 0.0


def slow_overlap(n: int, text: list[str], reference: list[str]) -> float:
    """F1 of n-grams, each of the reference's used up by at most one of the text's."""
    found, wanted = ([part[i : i + n] for i in range(len(part) - n + 1)] for part in (text, reference))
    left, common = list(wanted), 0
    for each in found:
        if each in left:
            left.remove(each)
            common += 1
    return 0.0 if common == 0 else 2 * (common / len(found)) * (common / len(wanted)) / (common / len(found) + common / len(wanted))


def slow_subsequence(text: list[str], reference: list[str]) -> int:
    row = [0] * (len(reference) + 1)
    for word in text:
        new = [0]
        for (corner, above), other in zip(pairwise(row), reference, strict=True):
            new.append(corner + 1 if word == other else max(above, new[-1]))
        row = new
    return row[-1]


@given(words, words)
def test_rouge_equals_a_slow_loop(text: str, reference: str) -> None:
    found, wanted = text.split(), reference.split()
    for n in range(1, 6):
        assert METRICS[f"rouge_{n}"](text, reference) == pytest.approx(slow_overlap(n, found, wanted))
    common = slow_subsequence(found, wanted)
    assert METRICS["rouge_l"](text, reference) == pytest.approx(2 * common / max(1, len(found) + len(wanted)))


@given(st.text(max_size=40), st.text(max_size=40))
def test_every_metric_lies_between_0_and_1_whatever_the_texts(text: str, reference: str) -> None:
    for metric in METRICS.values():
        assert 0.0 <= metric(text, reference) <= 1.0


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_words_of_rouge_are_those_of_the_reference_implementation_in_ascii(text: str) -> None:
    assert rouge_words(text) == [word for word in re.sub(r"[^a-z0-9]+", " ", text.lower()).split(" ") if word]


def test_rouge_knows_other_scripts() -> None:
    assert similar("rouge_1", "Привет, мир", "мир").reward == pytest.approx(2 / 3)
    assert similar("rouge_l", "東京", "東京").reward == 1.0


RAW = {"type": "text_similarity", "input": "{{sample.output_text}}", "reference": "{{item.answer}}"}


def test_all_other_metrics_of_the_contract_are_there() -> None:
    assert {parse_grader({**RAW, "evaluation_metric": metric}).type for metric in METRICS} == {"text_similarity"}
    assert set(CONTRACT) - METRICS.keys() == {"meteor", "cosine"}


@pytest.mark.parametrize(("metric", "reason"), [("meteor", "WordNet"), ("cosine", "embeddings")])
def test_metric_that_cannot_be_had_is_refused_with_its_reason(metric: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        parse_grader({**RAW, "evaluation_metric": metric})
    assert caught.value.param == "grader.evaluation_metric"


def test_too_long_a_text_is_a_failed_grade() -> None:
    result = similar("fuzzy_match", "x" * (MAX_CHARACTERS + 1), "x")
    assert (result.reward, result.error) == (None, "grader_request_invalid")
    assert similar("rouge_l", "x " * (MAX_CHARACTERS // 2), "x").error is None


def test_a_missing_column_fails_and_missing_json_of_the_completion_is_a_wrong_answer() -> None:
    spec = Spec(type="text_similarity", input="{{sample.output_json.text}}", reference="{{item.answer}}", evaluation_metric="bleu")
    assert grade(TextSimilarityGrader(spec), request("no json")).reward == 0.0
    result = grade(TextSimilarityGrader(spec), request(output_json={"text": "4"}, item={}))
    assert (result.reward, result.error) == (None, "invalid_variable_error")

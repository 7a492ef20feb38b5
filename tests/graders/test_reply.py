import json
import math

from hypothesis import given
from hypothesis import strategies as st

from core.redaction import MASK, Redactor
from graders.reply import parse_reply

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)
NO_SECRETS = Redactor([])


@given(JSON)
def test_only_a_finite_number_becomes_a_reward_and_only_null_abstains(value: object) -> None:
    grade = parse_reply(json.dumps({"score": value}).encode(), None, NO_SECRETS)
    if value is None:
        assert (grade.reward, grade.abstained, grade.error) == (None, True, None)
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        assert (grade.reward, grade.abstained, grade.error) == (float(value), False, None)
    else:
        assert (grade.reward, grade.abstained, grade.error) == (None, False, "grader_invalid_score")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_grade_or_an_error_and_never_an_exception(body: bytes) -> None:
    grade = parse_reply(body, (0.0, 1.0), NO_SECRETS)
    assert (grade.reward is None) == (grade.error is not None or grade.abstained)


@given(st.text(min_size=4, alphabet=st.characters(blacklist_characters="*", blacklist_categories=["Cs"])), st.text(), st.text())
def test_secret_is_gone_wherever_it_stands(secret: str, before: str, after: str) -> None:
    cleaned = Redactor([secret]).clean(f"{before}{secret}{after}")
    assert MASK in cleaned
    assert secret not in cleaned

"""Secrets are taken out of a text in whatever dress an endpoint echoes them."""

import base64
from urllib.parse import quote, quote_plus

import pytest

from core.redaction import MASK, Redactor

SECRET = "tok+en/with=odd&chars-5f1c2e77"


@pytest.mark.parametrize("before", ["", "u", "u:", "user:", "Bearer "])
@pytest.mark.parametrize("after", ["", "x", "xy", "\n"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
def test_secret_inside_base64_is_masked_wherever_it_begins(before: str, after: str, encode: object) -> None:
    assert callable(encode)
    cleaned = Redactor([SECRET]).clean(encode(f"{before}{SECRET}{after}".encode()).decode())
    assert MASK in cleaned
    left = base64.urlsafe_b64decode(cleaned.replace(MASK, "").replace("+", "-").replace("/", "_").rstrip("=") + "==")
    assert not any(SECRET[at : at + 4].encode() in left for at in range(len(SECRET) - 3))


@pytest.mark.parametrize(
    "dressed",
    [
        quote(SECRET, safe=""),
        quote(SECRET),
        quote_plus(SECRET),
        quote(SECRET, safe="").lower().replace(SECRET.lower(), ""),
        SECRET.encode().hex(),
    ],
)
def test_secret_in_a_url_or_in_hex_is_masked(dressed: str) -> None:
    assert Redactor([SECRET]).clean(f"a {dressed} b") == f"a {MASK} b"


def test_other_text_stays() -> None:
    assert Redactor([SECRET, "abc"]).clean("abc is a short word, dG9rK2Vu the beginning") == "abc is a short word, dG9rK2Vu the beginning"

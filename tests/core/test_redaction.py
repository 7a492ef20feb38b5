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
    encoded = encode(f"{before}{SECRET}{after}".encode()).decode()
    cleaned = Redactor([SECRET]).clean(encoded)
    assert cleaned.count(MASK) == 1
    num_left = len(cleaned) - len(MASK)
    assert num_left <= len(encode(f"{before}{after}".encode())) + 4  # of the secret no more than a byte at each end


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

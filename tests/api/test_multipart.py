"""The streaming reader against bodies built by httpx, cut at every place a network could cut them."""

from collections.abc import Iterator

import httpx
import pytest

from api.multipart import MAX_FIELD_BYTES, MAX_PARTS, read_parts
from core.errors import InvalidRequest


def built_by_httpx(content: bytes, **fields: str) -> tuple[str, bytes]:
    request = httpx.Request("POST", "http://host/", data=fields, files={"file": ("rows \u00e9.jsonl", content)})
    request.read()
    return request.headers["content-type"], request.content


def cut(data: bytes, size: int) -> Iterator[bytes]:
    return iter([data[start : start + size] for start in range(0, len(data), size)])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
def test_parts_come_out_whole_however_the_body_is_cut(size: int) -> None:
    content = b'{"a": 1}\r\n--not-the-boundary\r\n\r\n' * 5
    content_type, body = built_by_httpx(content, purpose="fine-tune")
    parts = [(part.name, part.filename, b"".join(part.chunks)) for part in read_parts(content_type, cut(body, size))]
    assert parts == [("purpose", None, b"fine-tune"), ("file", "rows \u00e9.jsonl", content)]


def test_reading_pulls_the_body_only_as_far_as_needed() -> None:
    pulled = 0
    content_type, body = built_by_httpx(b"x" * 1_000_000)

    def counting() -> Iterator[bytes]:
        nonlocal pulled
        for chunk in cut(body, 1000):
            pulled += 1
            yield chunk

    part = next(read_parts(content_type, counting()))
    next(part.chunks)
    assert pulled <= 2


def test_a_part_that_is_not_read_is_skipped() -> None:
    content_type, body = built_by_httpx(b"x" * 5000, purpose="fine-tune", other="y")
    assert [part.name for part in read_parts(content_type, cut(body, 100))] == ["purpose", "other", "file"]


@pytest.mark.parametrize("keep", [10, 60, -5])
def test_a_body_that_ends_early_is_refused(keep: int) -> None:
    content_type, body = built_by_httpx(b"x" * 500)
    with pytest.raises(InvalidRequest, match="ends"):
        list(read_parts(content_type, cut(body[:keep], 50)))


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        next(read_parts(content_type, iter([b"{}"])))
    assert caught.value.code == "invalid_multipart"


def test_fields_and_parts_are_bounded() -> None:
    content_type, body = built_by_httpx(b"", purpose="x" * (MAX_FIELD_BYTES + 1))
    with pytest.raises(InvalidRequest, match="longer"):
        next(read_parts(content_type, cut(body, 100))).text()
    content_type, body = built_by_httpx(b"", **{f"f{number}": "x" for number in range(MAX_PARTS)})
    with pytest.raises(InvalidRequest, match="more than"):
        list(read_parts(content_type, cut(body, 100)))

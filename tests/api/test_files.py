"""Files come back byte for byte, are refused whole, and are never held whole."""

import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from anyio import sleep_forever
from sqlalchemy import func, select, update

from api import multipart
from api.middleware import MULTIPART_OVERHEAD_BYTES
from database.blobs import CHUNK_BYTES
from database.models import BlobChunk, BlobChunkRef, BlobManifest, File
from tests.api.platform import ROW, Account, Platform, assert_error

BOUNDARY = "d41d8cd98f00b204"
MULTIPART = f"multipart/form-data; boundary={BOUNDARY}"


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    extra = f'; filename="{filename}"' if filename is not None else ""
    return f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()
PURPOSE = part("purpose", b"fine-tune")
CONTENT = part("file", ROW, "rows.jsonl")


def send(account: Account, body: Any, content_type: str = MULTIPART) -> Any:
    headers = {"authorization": f"Bearer {account.key}", "content-type": content_type}
    return account.http.post("/v1/files", content=body, headers=headers)


def count(platform: Platform) -> tuple[int, int]:
    """Rows of files and of blobs."""
    with platform.database.reading() as session:
        files = session.execute(select(func.count()).select_from(File)).scalar_one()
    with platform.database.blob_engine.connect() as connection:
        return files, connection.execute(select(func.count()).select_from(BlobManifest)).scalar_one()


def test_content_comes_back_as_it_was_sent(owner: Account) -> None:
    content = bytes(range(256)) * 5000
    file_id = owner.upload(content, filename="../a \u00e9.jsonl")
    shown = owner.get(f"/v1/files/{file_id}").json()
    assert (shown["bytes"], shown["filename"], shown["purpose"], shown["object"]) == (len(content), "a \u00e9.jsonl", "fine-tune", "file")
    assert shown["status"] == "processed"
    answer = owner.get(f"/v1/files/{file_id}/content")
    assert answer.content == content
    assert answer.headers["content-type"] == "application/octet-stream"
    assert "a%20%C3%A9.jsonl" in answer.headers["content-disposition"]


def test_fields_may_come_behind_the_file(owner: Account) -> None:
    assert send(owner, CONTENT + PURPOSE + END).status_code == 200


def call_asgi(platform: Platform, owner: Account, messages: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The answer to an upload that arrives as `messages`: the TestClient itself would join the whole body first."""
    sent: list[Any] = []
    headers = [(b"authorization", f"Bearer {owner.key}".encode()), (b"content-type", MULTIPART.encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/files", "query_string": b"", "headers": headers, "state": {}}

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await sleep_forever()
        raise AssertionError("nobody wakes it")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    platform.http.portal.call(platform.http.app, scope, receive, send)
    answer: dict[str, Any] = json.loads(b"".join(message.get("body", b"") for message in sent))
    return answer


def piece(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


def test_large_file_goes_in_and_out_in_pieces(owner: Account, platform: Platform) -> None:
    """20 MiB through the API while Python holds a fraction of it at any moment."""
    blocks = [number.to_bytes(8, "big") * 8192 for number in range(20 * CHUNK_BYTES // 65536)]
    whole = hashlib.sha256(b"".join(blocks)).hexdigest()

    def messages() -> Iterator[dict[str, Any]]:
        yield piece(PURPOSE + part("file", b"", "big.jsonl").removesuffix(b"\r\n"))
        yield from (piece(bytes(bytearray(block))) for block in blocks)
        yield piece(b"\r\n" + END, more=False)

    tracemalloc.start()
    file_id = call_asgi(platform, owner, messages())["id"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * CHUNK_BYTES
    with platform.database.reading() as session:
        file = session.get(File, file_id)
    assert file is not None
    assert (file.bytes, file.sha256) == (20 * CHUNK_BYTES, whole)
    assert hashlib.sha256(owner.get(f"/v1/files/{file_id}/content").content).hexdigest() == whole
    with platform.database.blob_engine.connect() as connection:
        chunks = select(func.count()).select_from(BlobChunkRef).where(BlobChunkRef.manifest_id == file.blob)
        assert connection.execute(chunks).scalar_one() == 20


def test_client_that_stops_sending_is_answered_and_leaves_nothing(
    owner: Account, platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multipart, "STALL_SECONDS", 0.05)
    before = count(platform)
    answer = call_asgi(platform, owner, iter([piece(PURPOSE + CONTENT[:-20])]))
    assert answer["error"]["code"] == "request_timeout"
    assert count(platform) == before


def test_damaged_content_is_an_error_and_not_an_answer(owner: Account, platform: Platform) -> None:
    content = b"unlike any other file: " + owner.project_id.encode()
    file_id = owner.upload(content)
    chunk = BlobChunk.digest == hashlib.sha256(content).hexdigest()
    with platform.database.blob_engine.begin() as connection:
        connection.execute(update(BlobChunk).where(chunk).values(data=b"changed"))
    answer = owner.get(f"/v1/files/{file_id}/content")
    assert_error(answer, 503, "storage_error")
    assert answer.headers["x-should-retry"] == "false"


def test_client_that_hangs_up_leaves_nothing(owner: Account, platform: Platform) -> None:
    before = count(platform)
    call_asgi(platform, owner, iter([piece(PURPOSE + CONTENT[:-20]), {"type": "http.disconnect"}]))
    assert count(platform) == before


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (CONTENT + END, "missing_required_parameter", "purpose"),
        (PURPOSE + END, "missing_required_parameter", "file"),
        (part("purpose", b"training") + CONTENT + END, "invalid_value", "purpose"),
        (CONTENT + part("purpose", b"training") + END, "invalid_value", "purpose"),
        (PURPOSE + part("file", b"", "rows.jsonl") + END, "empty_file", "file"),
        (PURPOSE + CONTENT + CONTENT + END, "unknown_parameter", "file"),
        (PURPOSE + CONTENT + part("porpoise", b"x") + END, "unknown_parameter", "porpoise"),
        (PURPOSE + part("file", ROW, "") + END, "invalid_value", "file"),
        (PURPOSE + part("file", ROW, "x" * 256) + END, "invalid_value", "file"),
        (PURPOSE + CONTENT + part("expires_after[anchor]", b"created_at") + END, "missing_required_parameter", "expires_after"),
        (PURPOSE + CONTENT + part("expires_after[seconds]", b"60") + END, "invalid_value", "expires_after[seconds]"),
        (PURPOSE + CONTENT + part("expires_after[anchor]", b"now") + END, "invalid_value", "expires_after[anchor]"),
        (PURPOSE + CONTENT, "invalid_multipart", None),
        (PURPOSE + CONTENT[:-30], "invalid_multipart", None),
        (b"not multipart at all", "invalid_multipart", None),
        (b"", "invalid_multipart", None),
    ],
)
def test_refused_upload_names_its_field_and_leaves_nothing(
    body: bytes, code: str, param: str | None, owner: Account, platform: Platform
) -> None:
    before = count(platform)
    assert_error(send(owner, body), 400, code, param)
    assert count(platform) == before


def test_json_in_place_of_an_upload_is_refused(owner: Account) -> None:
    assert_error(send(owner, b"{}", "application/json"), 400, "invalid_multipart")


@pytest.mark.parametrize("announce", [True, False])
def test_too_large_upload_is_refused_and_leaves_nothing(announce: bool, owner: Account, platform: Platform, small_uploads: int) -> None:
    before = count(platform)
    body = PURPOSE + part("file", b"x" * (small_uploads + 1 + MULTIPART_OVERHEAD_BYTES), "rows.jsonl") + END
    pieces = iter([body[start : start + 8192] for start in range(0, len(body), 8192)])
    assert_error(send(owner, body if announce else pieces), 413, "request_too_large")
    assert count(platform) == before


def test_expiry_is_kept_and_obeyed(owner: Account, platform: Platform) -> None:
    body = PURPOSE + part("expires_after[anchor]", b"created_at") + part("expires_after[seconds]", b"3600") + CONTENT + END
    file = send(owner, body).json()
    assert 3599 <= file["expires_at"] - file["created_at"] <= 3601
    with platform.database.transaction() as session:
        row = session.get(File, file["id"])
        assert row is not None
        row.expires_at = row.created_at - 1
    assert_error(owner.get(f"/v1/files/{file['id']}"), 404, "not_found", "id")


def test_deleted_file_is_gone_for_everybody(owner: Account) -> None:
    file_id = owner.upload()
    assert owner.delete(f"/v1/files/{file_id}").json() == {"id": file_id, "object": "file", "deleted": True}
    for answer in (owner.get(f"/v1/files/{file_id}"), owner.get(f"/v1/files/{file_id}/content"), owner.delete(f"/v1/files/{file_id}")):
        assert assert_error(answer, 404, "not_found", "id") == f"No such File object: {file_id}"


def test_list_pages_by_cursor_and_filters_by_purpose(owner: Account) -> None:
    ids = [owner.upload(filename=f"{number}.jsonl") for number in range(3)]
    other = owner.upload(purpose="user_data")
    first = owner.get("/v1/files", limit=2, purpose="fine-tune").json()
    assert [file["id"] for file in first["data"]] == [ids[2], ids[1]]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[2], ids[1])
    rest = owner.get("/v1/files", limit=2, purpose="fine-tune", after=first["last_id"]).json()
    assert ([file["id"] for file in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    assert [file["id"] for file in owner.get("/v1/files", order="asc").json()["data"]] == [*ids, other]

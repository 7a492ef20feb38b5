"""Streams a multipart body part by part: no part is ever held whole, on disk or in memory, unless the caller asks for a short field."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from anyio import fail_after, from_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from api.errors import RequestTimeout
from core.errors import InvalidRequest

MAX_FIELD_BYTES = 4096
MAX_PARTS = 16
STALL_SECONDS = 60.0
"""A client that sends nothing for so long loses its upload."""


@dataclass(frozen=True)
class Part:
    """One part. `chunks` must be read to its end before the next part is asked for."""

    name: str
    filename: str | None
    chunks: Iterator[bytes]

    def text(self) -> str:
        """The value of a short field. Raises: InvalidRequest."""
        data = b""
        for chunk in self.chunks:
            data += chunk
            if len(data) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"'{self.name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self.name)
        return _decoded(data)


def body_chunks(request: Request) -> Iterator[bytes]:
    """The body as it arrives, for a worker thread: each piece is awaited on the event loop, so a slow store slows the sender."""

    async def receive() -> tuple[bytes, bool]:
        with fail_after(STALL_SECONDS):
            message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return message.get("body", b""), bool(message.get("more_body"))

    has_more = True
    while has_more:
        try:
            data, has_more = from_thread.run(receive)
        except TimeoutError as error:
            raise RequestTimeout(f"No data for {STALL_SECONDS:g} seconds.") from error
        yield data


def read_parts(content_type: str, body: Iterator[bytes]) -> Iterator[Part]:
    """Raises: InvalidRequest for a body that is not multipart/form-data or ends early."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("The upload must be multipart/form-data with a boundary.", code="invalid_multipart")
    reader = _Reader(boundary, body)
    for number, (name, filename) in enumerate(reader.headers(), 1):
        if number > MAX_PARTS:
            raise InvalidRequest(f"The upload has more than {MAX_PARTS} parts.", code="invalid_multipart")
        part = Part(name, filename, reader.data())
        yield part
        for _ in part.chunks:
            continue


class _Reader:
    """Turns the push parser's callbacks into a queue of ("headers", bytes) | ("data", bytes) | ("end", b"") that is pulled."""

    def __init__(self, boundary: bytes, body: Iterator[bytes]) -> None:
        self._body = body
        self._queue: deque[tuple[str, bytes]] = deque()
        self._field, self._value, self._disposition = b"", b"", b""
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": lambda: self._queue.append(("headers", self._disposition)),
                "on_part_data": lambda data, start, end: self._queue.append(("data", data[start:end])),
                "on_part_end": lambda: self._queue.append(("end", b"")),
                "on_end": self._finish,
            },
        )

    def headers(self) -> Iterator[tuple[str, str | None]]:
        """(name, filename) of each part."""
        while (event := self._next()) is not None:
            _, options = parse_options_header(event[1])
            if b"name" not in options:
                raise InvalidRequest("A part of the upload has no name.", code="invalid_multipart")
            filename = options.get(b"filename")
            yield _decoded(options[b"name"]), None if filename is None else _decoded(filename)

    def data(self) -> Iterator[bytes]:
        """The bytes of the part whose headers came last."""
        while True:
            event = self._next()
            if event is None:
                raise InvalidRequest("The upload ends in the middle of a part.", code="invalid_multipart")
            if event[0] == "end":
                return
            yield event[1]

    def _next(self) -> tuple[str, bytes] | None:
        while not self._queue:
            chunk = next(self._body, None)
            if chunk is None:
                if not self._is_whole:
                    raise InvalidRequest("The upload ends before its last boundary.", code="invalid_multipart")
                return None
            try:
                self._parser.write(chunk)
            except FormParserError as error:
                raise InvalidRequest(f"The upload is not valid multipart: {error}.", code="invalid_multipart") from error
        return self._queue.popleft()

    def _begin(self) -> None:
        self._disposition = b""

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field, self._value = b"", b""

    def _finish(self) -> None:
        self._is_whole = True


def _decoded(data: bytes) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest("A field of the upload is not UTF-8.", code="invalid_multipart") from error
    if any(ord(character) < 32 for character in text):
        raise InvalidRequest("A field of the upload holds a control character.", code="invalid_multipart")
    return text

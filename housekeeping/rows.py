"""The lines of a stored file, one at a time: no file is held in memory."""

from collections.abc import Iterable, Iterator

from core.errors import InvalidRequest

MAX_LINE_BYTES = 32 * 1024 * 1024


def iter_lines(chunks: Iterable[bytes], param: str) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line) of every line that is not blank. Raises: InvalidRequest for a line without end."""
    for number, line in enumerate(_split(chunks, param), 1):
        if line.strip():
            yield number, line


def _split(chunks: Iterable[bytes], param: str) -> Iterator[bytes]:
    rest = b""
    number = 0
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        number += len(lines)
        yield from lines
        if len(rest) > MAX_LINE_BYTES:
            message = f"Line {number + 1} is longer than {MAX_LINE_BYTES} bytes."
            raise InvalidRequest(message, code=f"invalid_{param}", param=param)
    if rest:
        yield rest

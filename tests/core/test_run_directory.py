"""The files between worker and trainer: torn lines, whole lines, publish by rename."""

import json
from pathlib import Path

import pytest

from core.errors import InvalidTransition
from core.lifecycle import TRANSITIONS, Status, check_transition, is_terminal, sources_of
from core.run_directory import LineWriter, MetricsLine, cut_torn_line, publish_json, whole_lines


def metrics(step: int) -> MetricsLine:
    return MetricsLine(step=step, phase="train", values={"reward_mean": 0.5})


@pytest.mark.parametrize(
    ("before", "after"), [(b"", b""), (b"torn", b""), (b"a\n", b"a\n"), (b"a\nb\nto", b"a\nb\n"), (b"a\n" + b"x" * 200_000, b"a\n")]
)
def test_torn_last_line_is_cut(tmp_path: Path, before: bytes, after: bytes) -> None:
    path = tmp_path / "lines"
    path.write_bytes(before)
    cut_torn_line(path)
    assert path.read_bytes() == after


def test_writer_continues_behind_the_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    LineWriter(path).write(metrics(1))
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "pha')
    LineWriter(path).write(metrics(3))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


def test_reader_takes_whole_lines_only_and_each_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    text = b"first\n" + b"y" * 50 + b"\nlast\n"
    seen, offset = [], 0
    for end in range(len(text) + 1):
        path.write_bytes(text[:end])
        lines, offset = whole_lines(path, offset, max_bytes=7)
        seen += lines
    assert seen == text.splitlines()


def test_line_longer_than_the_block_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"z" * 100 + b"\nnext\n")
    assert whole_lines(path, 0, max_bytes=16)[0][0] == b"z" * 100


def test_published_file_replaces_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for step in (1, 2):
        publish_json(tmp_path / "outcome.json", metrics(step))
    assert [path.name for path in tmp_path.iterdir()] == ["outcome.json"]
    assert json.loads((tmp_path / "outcome.json").read_text())["step"] == 2


def test_terminal_statuses_never_leave() -> None:
    assert {status for status in Status if is_terminal(status)} == {Status.SUCCEEDED, Status.FAILED, Status.CANCELLED}


@pytest.mark.parametrize("current", Status)
@pytest.mark.parametrize("target", Status)
def test_transition_is_refused_exactly_when_the_table_lacks_it(current: Status, target: Status) -> None:
    assert (current in sources_of(target)) == (target in TRANSITIONS[current])
    if target in TRANSITIONS[current]:
        check_transition(current, target)
    else:
        with pytest.raises(InvalidTransition, match=current.value):
            check_transition(current, target)

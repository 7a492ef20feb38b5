"""`hone verify-run` on runs that really happened: equal, parted, cut short, half there."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from client.client import Client
from core.run_directory import (
    CHECKPOINTS,
    JOB,
    MANIFEST,
    METRICS,
    RESUME_POINTS,
    STATE_HASH,
    Control,
    ResolvedJob,
    publish_json,
    published,
    read_manifest,
    write_control,
)
from graders.grade import GradeRequest
from local import cli, run_records
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, train_here

SAME, DIFFERENT, UNKNOWN, PREFIX = 0, 1, 2, 3
OPTIONS: dict[str, Any] = {"max_steps": 4, "batch_size": 2, "group_size": 2, "resume_point_interval": 2, "checkpoint_interval": 4}


def train(folder: Path, grade: Callable[[GradeRequest], float] = letter_fraction, *, job_id: str = "ftjob-test", **changes: Any) -> Path:
    make_run_directory(folder, **{**OPTIONS, **changes})
    job = ResolvedJob.model_validate_json((folder / JOB).read_text())
    publish_json(folder / JOB, job.model_copy(update={"job_id": job_id}))
    train_here(folder, FunctionGrader(grade))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def verify(*arguments: object) -> Result:
    return CliRunner().invoke(cli.commands, ["verify-run", *map(str, arguments)])


def facts(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(verify(*arguments, "--json").output)
    return found


def keep_lines(folder: Path, kept: slice) -> Path:
    """`folder` with these lines of metrics.jsonl only."""
    lines = (folder / METRICS).read_text().splitlines(keepends=True)
    (folder / METRICS).write_text("".join(lines[kept]))
    return folder


def test_the_same_job_under_another_id_is_the_same_run(run: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "again", job_id="ftjob-other")
    result = verify(run, again)
    assert result.exit_code == SAME
    assert result.output.startswith("The same run: every step up to 4, the last of both, is equal.")
    assert "Weights and optimizers are equal: resume point of step 2, checkpoint of step 4." in result.output
    assert "differ" not in result.output
    assert "not compared" not in result.output


def test_another_seed_parts_at_the_first_step_and_is_named(run: Path, tmp_path: Path) -> None:
    other = train(tmp_path / "other", seed=2)
    result = verify(run, other)
    assert result.exit_code == DIFFERENT
    assert result.output.startswith("Different runs: no step is equal, step 1 differs.")
    found = facts(run, other)
    assert found["different_settings"] == {"seed": [1, 2]}
    assert found["different_states"] == [{"kind": "resume_point", "step": 2}, {"kind": "checkpoint", "step": 4}]


def test_one_reward_changed_parts_the_runs_there_and_shows_what_differs(run: Path, tmp_path: Path) -> None:
    """The reward of the step, what was learnt from it, and nothing that only the clock decides."""
    raised = iter([0.5])

    def grade(request: GradeRequest) -> float:
        return letter_fraction(request) + (next(raised, 0.0) if request.metadata["step"] == 2 else 0.0)

    other = train(tmp_path / "other", grade)
    result = verify(run, other)
    assert result.exit_code == DIFFERENT
    assert result.output.startswith("Different runs: every step up to 1 is equal, step 2 differs.")
    found = facts(run, other)
    ours, theirs = (read_metrics(folder)[1].values for folder in (run, other))
    assert found["different_metrics"]["reward_mean"] == [ours["reward_mean"], theirs["reward_mean"]]
    assert theirs["reward_mean"] == pytest.approx(ours["reward_mean"] + 0.5 / 4)
    assert "grad_norm" in found["different_metrics"]
    assert not {name for name in found["different_metrics"] if name.startswith("seconds_") or name == "tokens_per_second"}
    assert found["different_settings"] == {}


def test_run_that_was_stopped_early_is_a_prefix(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"

    def grade(request: GradeRequest) -> float:
        if request.metadata["step"] == 3:
            write_control(folder, Control.PAUSE)
        return letter_fraction(request)

    train(folder, grade)
    for arguments, shorter in (((run, folder), "B"), ((folder, run), "A")):
        result = verify(*arguments)
        assert result.exit_code == PREFIX
        assert result.output.startswith(f"The same run as far as both go: every step up to 2 is equal, where {shorter} ends.")
        assert "Weights and optimizers are equal: resume point of step 2" in result.output


def test_equal_digests_with_other_weights_are_different_runs(run: Path, copy: Path) -> None:
    manifest = copy / CHECKPOINTS / "step_000004" / MANIFEST
    content = json.loads(manifest.read_text())
    content["facts"]["state_sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))
    result = verify(run, copy)
    assert result.exit_code == DIFFERENT
    assert result.output.startswith("Different runs: every step up to 4 is equal, but weights or optimizers are not.")
    assert "Weights or optimizers differ: checkpoint of step 4" in result.output


def test_state_that_only_one_side_has_is_said_to_be_not_compared(run: Path, copy: Path) -> None:
    for kind in (CHECKPOINTS, RESUME_POINTS):
        shutil.rmtree(copy / kind)
    result = verify(run, copy)
    assert result.exit_code == SAME
    assert "What the update of step 4 made of the weights is not compared" in result.output


def test_directory_of_a_later_attempt_is_the_same_run_by_its_chain(run: Path, copy: Path) -> None:
    """It starts behind a resume point; its digests contain those before it."""
    assert verify(run, keep_lines(copy, slice(2, None))).exit_code == SAME


def test_runs_without_a_step_in_common_cannot_be_told_apart(run: Path, copy: Path, tmp_path: Path) -> None:
    head = keep_lines(Path(shutil.copytree(run, tmp_path / "head")), slice(0, 2))
    result = verify(head, keep_lines(copy, slice(2, None)))
    assert result.exit_code == UNKNOWN
    assert result.output.startswith("Cannot tell: they have no step in common.")
    (head / METRICS).unlink()
    assert verify(run, head).exit_code == UNKNOWN


def test_line_that_is_still_being_written_is_left_out(run: Path, copy: Path) -> None:
    with open(copy / METRICS, "a") as file:
        file.write('{"step": 5, "phase": "tr')
    assert verify(run, copy).exit_code == SAME


def test_what_is_no_run_is_named_and_cannot_be_told(run: Path, copy: Path, tmp_path: Path) -> None:
    result = verify(run, tmp_path / "nothing")
    assert result.exit_code == UNKNOWN
    assert "is neither a run directory" in result.output
    (copy / METRICS).write_text("no JSON\n")
    assert verify(run, copy).exit_code == UNKNOWN
    assert facts(run, tmp_path / "nothing")["verdict"] == "unknown"


def test_command_line_prints_one_json_object(run: Path) -> None:
    """As a process, since scripts will run it so."""
    command = [sys.executable, "-m", "local.cli", "verify-run", str(run), str(run), "--json"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = json.loads(process.stdout)
    assert (process.returncode, found["verdict"], found["last_equal_step"]) == (SAME, "same", 4)
    assert found["a"] == {"name": str(run), "steps": 4, "last_step": 4}


class ApiOfARun:
    """Answers as the API does for the job that `folder` is, in pages of two digests; anything else is not found."""

    def __init__(self, folder: Path) -> None:
        self._job = ResolvedJob.model_validate_json((folder / JOB).read_text())
        self._lines = read_metrics(folder)
        (final,) = published(folder, CHECKPOINTS)
        self._state = read_manifest(final).facts[STATE_HASH]

    def __call__(self, request: httpx.Request) -> httpx.Response:
        routes = {"": self._retrieve, "/digests": self._digests, "/metrics": self._metrics}
        name = request.url.path.removeprefix("/v1/fine_tuning/jobs/ftjob-real")
        if name not in routes:
            return httpx.Response(404, json={"error": {"message": "Could not find fine tune", "code": "fine_tune_not_found"}})
        return httpx.Response(200, json=routes[name](request))

    def _retrieve(self, request: httpx.Request) -> dict[str, Any]:
        return {"seed": self._job.seed, "model_digest": "d" * 64, "options": self._job.options.model_dump(mode="json")}

    def _digests(self, request: httpx.Request) -> dict[str, Any]:
        start = int(request.url.params.get("after", "ftdigest-0").removeprefix("ftdigest-"))
        data = [{"id": f"ftdigest-{line.step}", "step": line.step, "digest": line.digest} for line in self._lines]
        states = [{"kind": "checkpoint", "step": 4, "state_sha256": self._state}]
        return {"data": data[start : start + 2], "has_more": start + 2 < len(data), "states": states}

    def _metrics(self, request: httpx.Request) -> dict[str, Any]:
        points = [(line, name, value) for line in self._lines for name, value in line.values.items()]
        data = [{"step": line.step, "phase": line.phase, "name": name, "value": value} for line, name, value in points]
        return {"data": data, "has_more": False, "last_seq": len(data)}


def test_job_is_compared_through_the_api(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = httpx.MockTransport(ApiOfARun(run))
    monkeypatch.setattr(run_records, "connect", lambda: Client("http://hone.test/v1", "k", http=api))
    assert verify("ftjob-real", run).exit_code == SAME
    found = facts(run, "ftjob-real")
    assert (found["verdict"], found["equal_states"]) == ("same", [{"kind": "checkpoint", "step": 4}])
    other = facts(train(tmp_path / "other", seed=2), "ftjob-real")
    assert other["first_different_step"] == 1
    assert other["different_metrics"]["entropy"][1] == read_metrics(run)[0].values["entropy"]
    missing = verify(run, "ftjob-none")
    assert (missing.exit_code, "Could not find" in missing.output) == (UNKNOWN, True)

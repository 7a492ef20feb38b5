"""What the disk of a killed run must show for the kill to have been where it was meant to be."""

import json
from pathlib import Path

from core.run_directory import JOB, MANIFEST, METRICS, REWARDS, MetricsLine, ResolvedJob, step_folder, whole_lines
from tests.resume.killed_trainer import Fault
from worker.prepare import is_whole


def assert_inside(fault: Fault, directory: Path, steps_done: int) -> None:
    options = ResolvedJob.model_validate_json((directory / JOB).read_text()).options
    num_rollouts = options.batch_size * (options.group_size or 0)
    num_graded = len(journaled(directory, "rollout", fault.step))
    match fault.place:
        case "decode step":
            assert steps_done < fault.step
            assert num_graded < num_rollouts
        case "replacement":
            assert len(journaled(directory, "rollout", steps_done + 1)) >= num_rollouts
        case "half graded":
            assert steps_done < fault.step
            assert num_graded == num_rollouts // 2
        case "backward" | "optimizer step":
            assert steps_done == fault.step - 1
            assert num_graded >= num_rollouts
        case "half a line":
            assert steps_done == fault.step - 1
            assert not (directory / METRICS).read_bytes().endswith(b"\n")
        case "evaluation":
            lines = [MetricsLine.model_validate_json(line) for line in whole_lines(directory / METRICS, 0)[0]]
            assert (lines[-1].step, lines[-1].phase) == (fault.step, "train")
        case _:
            assert steps_done == fault.step
            _assert_unpublished(fault, directory)


def _assert_unpublished(fault: Fault, directory: Path) -> None:
    target = directory / fault.folder / step_folder(fault.step)
    temporary = target.with_name(f"{target.name}.tmp")
    assert not (target / MANIFEST).exists()
    sizes = [path.stat().st_size for path in temporary.iterdir() if path.suffix in (".pt", ".safetensors")]
    assert bool(sizes) == (fault.place != "removal")
    assert is_whole(temporary) == (fault.place == "before rename")
    assert (temporary / MANIFEST).exists() or fault.place != "before rename"


def journaled(directory: Path, purpose: str, step: int) -> list[str]:
    """Keys of the verdicts on the completions of a step that stand in the journal."""
    journal = directory / REWARDS
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    return [line["key"] for line in lines if (line.get("purpose"), line.get("step")) == (purpose, step)]

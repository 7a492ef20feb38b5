"""docs/metrics.md against runs: a run reports exactly the names of the page whose `absent` does not hold for it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.options import Options
from core.run_directory import EVENTS, JOB, VARIABLE_METRICS, End, ResolvedJob
from graders.grade import Grade, GradeRequest
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics, train_here

PAGE = (Path(__file__).parents[2] / "docs/metrics.md").read_text()

ABSENT: dict[str, Callable[[Options], bool]] = {
    "every optimizer step was skipped": lambda options: False,
    "never": lambda options: False,
    "no completion was graded": lambda options: False,
    "no sub-scores": lambda options: False,
    "no such failure": lambda options: True,
    "nothing counted": lambda options: False,
    "nothing counted, or value warm-up": lambda options: False,
    "no evaluation": lambda options: False,
    "last step of `max_staleness` 1": lambda options: False,
    "no value model": lambda options: not options.needs_values,
    "no reference model": lambda options: not options.needs_reference,
    "`dynamic_sampling` 0": lambda options: options.dynamic_sampling == 0,
    "`overlong_penalty` 0": lambda options: options.overlong_penalty == 0,
}
"""What the page says under `absent` -> whether it holds in a run whose completions are all graded and which is evaluated."""

RUNS: dict[str, dict[str, Any]] = {
    "plain": {"algorithm": "dr_grpo"},
    "grpo": {"algorithm": "grpo", "kl_coefficient": 0.1, "dynamic_sampling": 1, "overlong_penalty": 0.5},
    "reinforce_pp": {"algorithm": "reinforce_pp", "kl_coefficient": 0.1, "max_staleness": 1},
    "ppo": {"algorithm": "ppo", "kl_coefficient": 0.1, "value_warmup_steps": 1, "epochs_per_batch": 2},
    "shared": {"algorithm": "ppo", "value_model": "shared_backbone", "group_size": 2},
}


def table(*headings: str) -> dict[str, list[str]]:
    """The first cell's name -> the other cells, of the tables below these headings."""
    rows = {}
    for heading in headings:
        section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
        for name, cells in re.findall(r"^\| `([^`]+)` \| (.*) \|$", section, re.MULTILINE):
            rows[name] = cells.split(" | ")
    return rows


TRAIN = table("Rewards and graders", "Completions", "Update", "Time and memory")
VALIDATION = table("Validation")


def grade(request: GradeRequest) -> Grade:
    return Grade(reward=letter_fraction(request), sub_scores={"letter": letter_fraction(request)})


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Options]:
    folder = make_run_directory(tmp_path_factory.mktemp(request.param), max_steps=2, valid_rows=2, **RUNS[request.param])
    assert train_here(folder, FunctionGrader(grade)).end is End.SUCCEEDED
    return folder, ResolvedJob.model_validate_json((folder / JOB).read_text()).options


def expected(rows: dict[str, list[str]], options: Options) -> set[str]:
    return {name for name, (*_, absent) in rows.items() if not ABSENT[absent](options)}


def test_a_run_reports_the_names_of_the_page_and_no_others(run: tuple[Path, Options]) -> None:
    folder, options = run
    train = {re.sub("^graders/.*/", "graders/<name>/", name) for line in read_metrics(folder) for name in line.values}
    assert train == expected(TRAIN, options)
    valid = {name for line in read_metrics(folder, "valid") for name in line.values}
    assert valid == expected(VALIDATION, options)


def test_what_is_never_absent_stands_in_every_line(run: tuple[Path, Options]) -> None:
    folder, _ = run
    for phase, rows in (("train", TRAIN), ("valid", VALIDATION)):
        always = {name for name, cells in rows.items() if cells[-1] == "never"}
        assert all(line.values.keys() >= always for line in read_metrics(folder, phase))


def test_the_contracts_names_are_those_of_the_events(run: tuple[Path, Options]) -> None:
    folder, _ = run
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    found = {name for event in events if event["type"] == "metrics" for name in event["data"]}
    ours = {name for phase in ("train", "valid") for line in read_metrics(folder, phase) for name in line.values}
    assert found - ours == set(table("The contract's names"))


def test_the_page_lists_exactly_what_differs_between_equal_runs() -> None:
    section = PAGE.split("## What repeats bit for bit\n")[1].split("\n## ")[0]
    listed = set(re.findall("`([a-z_]+)`", section)) - {"deterministic", "digest"}
    assert listed == {name for name in {**TRAIN, **VALIDATION} if name.startswith(VARIABLE_METRICS)}


def test_every_way_to_be_absent_is_met() -> None:
    assert {cells[-1] for cells in {**TRAIN, **VALIDATION}.values()} == ABSENT.keys()

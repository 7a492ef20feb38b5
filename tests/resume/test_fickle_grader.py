"""A grader that says something else each time it is asked: the continued run is the same run only if the journal answers for it.

Spawns trainers, as test_resume.py does.
"""

import json
from pathlib import Path
from random import Random

import pytest

from core.grader_specs import PinnedEndpointGrader
from core.run_directory import REWARDS
from outbound.signing import ID_HEADER
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, score
from tests.resume.bench import Result, kill_and_continue
from tests.resume.cases import SEED, Case
from tests.resume.comparison import differences, last_digest
from tests.resume.killed_trainer import Fault
from tests.resume.processes import run_to_end
from tests.resume.settings import Setting, make_directory

SECRETS = {"inline": {"headers": {}, "signing_secret": None}}


class FickleGrader:
    """A new random score for every request. When it `repeats`, the last score that it gave to the same request."""

    def __init__(self) -> None:
        self.scores: dict[str, list[float]] = {}
        """By the request's id, in the order in which they were given. No two are equal."""

        self.repeats = False
        self._draw = Random(SEED)

    def __call__(self, received: Received) -> Reply:
        given = self.scores.setdefault(received.headers[ID_HEADER], [])
        if not self.repeats:
            given.append(self._draw.random())
        return score(given[-1])


def journaled_scores(directory: Path) -> set[float]:
    return {json.loads(line)["reward"] for line in (directory / REWARDS).read_text().splitlines()}


def directory_with(folder: Path, setting: Setting, endpoint: FakeEndpoint) -> Path:
    grader = PinnedEndpointGrader(type="endpoint", url=endpoint.url, secret_ref="inline", grader_version="inline")
    return make_directory(folder, setting, grader, allowed_private_networks=LOOPBACK, allow_http_graders=True)


CASES = [
    Case(Setting("grpo", "full", 1), "fickle grader", (Fault("half graded", step=5),)),
    Case(Setting("ppo", "lora", 0), "fickle grader", (Fault("half graded", step=5),), is_elsewhere=True),
]


@pytest.mark.resume
@pytest.mark.parametrize("fickle", CASES, ids=str)
def test_what_was_journaled_is_not_asked_again(tmp_path: Path, fickle: Case, results: list[Result]) -> None:
    grader = FickleGrader()
    with FakeEndpoint(grader) as endpoint:
        first = directory_with(tmp_path / "1", fickle.setting, endpoint)
        pieces, kills = kill_and_continue(fickle, first, list(fickle.faults), SECRETS)
        grader.repeats = True
        reference = directory_with(tmp_path / "uninterrupted", fickle.setting, endpoint)
        run_to_end(reference, SECRETS)
    results.append(Result(fickle, kills, last_digest(pieces[-1]), differences(reference, pieces)))
    assert results[-1].differences == []
    assert journaled_scores(pieces[-1]) == {given[-1] for given in grader.scores.values()}, "a journaled score was asked for again"

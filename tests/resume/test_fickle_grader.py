"""A grader that says something else each time it is asked: the continued run is the same run only if the journal answers for it.

Spawns trainers, as test_resume.py does.
"""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from core.grader_specs import PinnedEndpointGrader
from core.run_directory import REWARDS
from outbound.signing import ID_HEADER
from tests.fake_endpoint import LOOPBACK, FakeEndpoint, Received, Reply, score, status
from tests.resume.bench import Result, kill_and_continue
from tests.resume.cases import SEED, Case
from tests.resume.comparison import differences, last_digest
from tests.resume.killed_trainer import Fault
from tests.resume.processes import run_to_end
from tests.resume.settings import Setting, make_directory

SECRETS = {"inline": {"headers": {}, "signing_secret": None}}


REFUSAL_RATE = 0.1


class FickleGrader:
    """A new random score for every request, or a refusal. When it `repeats`, what it last said to the same request."""

    def __init__(self) -> None:
        self.answers: dict[str, list[float | None]] = {}
        """By the request's id, in the order in which they were given. None: refused. No two scores are equal."""

        self.repeats = False
        self._draw = Random(SEED)

    def __call__(self, received: Received) -> Reply:
        given = self.answers.setdefault(received.headers[ID_HEADER], [])
        if not self.repeats:
            given.append(None if self._draw.random() < REFUSAL_RATE else self._draw.random())
        return status(400) if given[-1] is None else score(given[-1])


def journaled_rewards(directory: Path) -> list[float | None]:
    return [json.loads(line)["reward"] for line in (directory / REWARDS).read_text().splitlines()]


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
    used = [given[-1] for given in grader.answers.values()]
    assert Counter(journaled_rewards(pieces[-1])) == Counter(used), "what was journaled was asked for again"
    assert None in used

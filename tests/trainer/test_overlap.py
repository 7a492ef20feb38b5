"""What goes on at the same time: graders work while the model samples, and with `max_staleness` 1 while it samples the next batch too."""

import threading
from pathlib import Path

import pytest

from core.run_directory import TRAIN, VALID, End, Outcome
from tests.fake_endpoint import FakeEndpoint, Received, Reply, score
from tests.graders.helpers import endpoint_grader
from tests.trainer.runs import FunctionGrader, letter_fraction, make_run_directory, read_metrics
from trainer.control import ControlReader, Pulse
from trainer.loop import run_job, train
from trainer.session import MakeGrader, open_run


def maker(endpoint: FakeEndpoint) -> MakeGrader:
    return lambda spec, secrets, network: endpoint_grader(endpoint, timeout_seconds=60.0, max_concurrency=256)


class HoldingControl(ControlReader):
    """Holds the sampling, from its second look at the worker's wishes on, until a completion has reached `endpoint`."""

    def __init__(self, run_directory: Path, pulse: Pulse, endpoint: FakeEndpoint) -> None:
        super().__init__(run_directory, pulse)
        self._endpoint = endpoint
        self.graded_during_sampling: list[int] = []

    def check(self) -> None:
        super().check()
        if self.graded_during_sampling:
            self._endpoint.wait_for_requests(1)
        self.graded_during_sampling.append(len(self._endpoint.requests))


def test_the_first_completion_reaches_its_grader_while_others_are_still_sampled(tmp_path: Path) -> None:
    folder = make_run_directory(tmp_path / "run", max_completion_tokens=64)
    pulse = Pulse(folder)
    with FakeEndpoint([score(0.5, is_held=lambda: True)]) as endpoint:
        control = HoldingControl(folder, pulse, endpoint)
        run = open_run(folder, {}, control, pulse, maker(endpoint))
        try:
            pending = run.collector.generate(1)
        finally:
            run.close()
            pulse.stop()
    assert 0 < control.graded_during_sampling[1] < len(pending.rollouts) == 32


def run_beside(folder: Path, endpoint: FakeEndpoint) -> tuple[threading.Thread, list[Outcome]]:
    outcomes: list[Outcome] = []

    def run() -> None:
        pulse = Pulse(folder)
        outcomes.append(run_job(folder, {}, ControlReader(folder, pulse), pulse, maker(endpoint)))
        pulse.stop()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcomes


def test_with_staleness_1_the_next_batch_is_sampled_while_graders_hold_the_present_one(tmp_path: Path) -> None:
    holds = threading.Event()
    holds.set()

    def answer(received: Received) -> Reply:
        return score(0.5, is_held=holds.is_set) if received.json["metadata"]["step"] == 1 else score(0.25)

    folder = make_run_directory(tmp_path / "run", max_staleness=1, max_steps=2, batch_size=2, group_size=4)
    with FakeEndpoint(answer) as endpoint:
        thread, outcomes = run_beside(folder, endpoint)
        endpoint.wait_for_requests(16, seconds=60.0)
        assert holds.is_set()
        assert sorted(received.json["metadata"]["step"] for received in endpoint.requests) == [1] * 8 + [2] * 8
        assert not read_metrics(folder)
        holds.clear()
        thread.join(60.0)
    assert [outcome.end for outcome in outcomes] == [End.SUCCEEDED]
    assert [line.values["reward_mean"] for line in read_metrics(folder)] == [0.5, 0.25]


@pytest.mark.parametrize("staleness", [0, 1])
def test_rows_are_read_and_rendered_once_before_the_first_step(tmp_path: Path, staleness: int) -> None:
    folder = make_run_directory(tmp_path / "run", max_steps=4, valid_rows=2, eval_interval=2, max_staleness=staleness)
    pulse = Pulse(folder)
    run = open_run(folder, {}, ControlReader(folder, pulse), pulse, FunctionGrader(letter_fraction).maker)
    try:
        (folder / TRAIN).unlink()
        (folder / VALID).unlink()
        train(run)
    finally:
        run.close()
        pulse.stop()
    assert [line.step for line in read_metrics(folder)] == [1, 2, 3, 4]

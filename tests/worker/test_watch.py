"""The watch as a function of the time: what the trainer is told, and when."""

import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from core.lifecycle import Status
from core.run_directory import BEAT, PROGRESS, Control, read_control
from core.settings import Settings
from worker.context import Holding
from worker.watch import BEAT_SECONDS, PARK_SECONDS, START_SECONDS, Watch


class Process:
    """Writes down what it is sent."""

    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, number: int) -> None:
        self.sent.append(signal.Signals(number).name)

    def send_group(self, number: int) -> None:
        self.sent.append(f"group {signal.Signals(number).name}")


class Scene:
    """A watch over a trainer that shows life at every tick, with a lease that is renewed before it."""

    def __init__(self, home: Path) -> None:
        settings = Settings(home=home, lease_seconds=100, cancel_grace_seconds=30, wind_down_seconds=120, stall_seconds=1800)
        worker = SimpleNamespace(settings=settings, drain=threading.Event())
        claim = SimpleNamespace(job=SimpleNamespace(id="job"), token="t", attempt=1)
        self.holding = Holding(worker, claim)
        self.holding.directory.mkdir(parents=True)
        self.process = Process()
        self.watch = Watch(self.holding, self.process, 0.0)
        self._touched = 0

    def touch(self, name: str) -> None:
        self._touched += 1
        path = self.holding.directory / name
        path.touch()
        os.utime(path, ns=(self._touched, self._touched))

    def tick(self, now: float, *, renewed: bool = True, alive: tuple[str, ...] = (BEAT, PROGRESS)) -> list[str]:
        """What was sent by now."""
        if renewed:
            self.holding.renewed_at = now
        for name in alive:
            self.touch(name)
        self.watch.tick(now)
        return self.process.sent


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_cancel_is_a_sigterm_at_once_and_a_sigkill_of_the_group_after_the_grace(scene: Scene) -> None:
    assert scene.tick(10) == []
    scene.holding.wanted = Status.CANCELLED
    assert scene.tick(20) == ["SIGTERM"]
    assert read_control(scene.holding.directory) == Control.CANCEL
    assert scene.tick(49.9) == ["SIGTERM"]
    assert scene.tick(50) == ["SIGTERM", "group SIGKILL"]
    assert scene.tick(51) == ["SIGTERM", "group SIGKILL"]


@pytest.mark.parametrize("who", ["user", "worker"])
def test_pause_and_drain_give_the_trainer_the_time_to_write(scene: Scene, who: str) -> None:
    if who == "user":
        scene.holding.wanted = Status.PAUSED
    else:
        scene.holding.worker.drain.set()
    assert scene.tick(10) == []
    assert read_control(scene.holding.directory) == (Control.PAUSE if who == "user" else Control.DRAIN)
    assert scene.tick(129) == []
    assert scene.tick(130) == ["group SIGKILL"]


def test_cancel_overtakes_a_pause_and_not_the_other_way_round(scene: Scene) -> None:
    scene.holding.wanted = Status.PAUSED
    scene.tick(10)
    scene.holding.wanted = Status.CANCELLED
    assert scene.tick(20) == ["SIGTERM"]
    scene.holding.worker.drain.set()
    scene.tick(30)
    assert read_control(scene.holding.directory) == Control.CANCEL
    assert scene.tick(50) == ["SIGTERM", "group SIGKILL"]


def test_job_that_was_paused_and_resumed_between_two_heartbeats_winds_down(scene: Scene) -> None:
    scene.holding.wanted = Status.QUEUED
    scene.tick(10)
    assert read_control(scene.holding.directory) == Control.DRAIN


def test_trainer_is_frozen_while_the_lease_has_passed_and_not_blamed_for_it(scene: Scene) -> None:
    scene.tick(10)
    assert scene.tick(110, renewed=False) == []
    assert scene.tick(111, renewed=False, alive=()) == ["group SIGSTOP"]
    assert scene.tick(3000, renewed=False, alive=()) == ["group SIGSTOP"]
    assert scene.tick(3001, alive=()) == ["group SIGSTOP", "group SIGCONT"]
    assert scene.tick(3002) == ["group SIGSTOP", "group SIGCONT"]
    assert scene.holding.error is None


def test_trainer_that_was_frozen_for_an_hour_is_given_up_without_a_word(scene: Scene) -> None:
    scene.tick(10)
    scene.tick(111, renewed=False, alive=())
    scene.tick(111 + PARK_SECONDS + 1, renewed=False, alive=())
    assert scene.holding.is_lost.is_set()
    assert scene.tick(111 + PARK_SECONDS + 2, renewed=False, alive=()) == ["group SIGSTOP", "group SIGKILL"]


def test_lost_lease_kills_at_once(scene: Scene) -> None:
    scene.holding.is_lost.set()
    assert scene.tick(10) == ["group SIGKILL"]


@pytest.mark.parametrize(
    ("alive", "limit"), [((PROGRESS,), BEAT_SECONDS), ((BEAT,), 1800.0)], ids=["no beat for a minute", "no progress for stall_seconds"]
)
def test_trainer_without_a_sign_of_life_is_killed_as_stalled(scene: Scene, alive: tuple[str, ...], limit: float) -> None:
    scene.tick(100)
    assert scene.tick(100 + limit, alive=alive) == []
    scene.tick(100.1 + limit, alive=alive)
    assert scene.holding.error is not None
    assert (scene.holding.error.code, scene.holding.error.retryable) == ("trainer_stalled", True)
    assert scene.tick(101 + limit) == ["group SIGKILL"]


def test_trainer_that_still_imports_is_given_longer(scene: Scene) -> None:
    scene.tick(START_SECONDS - 1, alive=())
    assert scene.holding.error is None
    scene.tick(START_SECONDS + 1, alive=())
    assert scene.holding.error is not None

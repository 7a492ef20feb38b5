import signal

import pytest

from worker.conclude import crash


@pytest.mark.parametrize(
    ("exit_code", "log", "oom_kills", "code"),
    [
        (-signal.SIGKILL, "step 3", 1, "out_of_memory"),
        (-signal.SIGKILL, "step 3", 0, "trainer_crashed"),
        (-signal.SIGSEGV, "step 3", 1, "trainer_crashed"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", 0, "out_of_memory"),
        (1, "MemoryError", 0, "out_of_memory"),
        (1, "ValueError: x", 0, "trainer_crashed"),
        (None, "", 0, "trainer_crashed"),
    ],
)
def test_end_without_an_outcome_is_told_apart_by_signal_kernel_and_log(exit_code: int | None, log: str, oom_kills: int, code: str) -> None:
    error = crash(exit_code, log, oom_kills)
    assert (error.code, error.retryable) == (code, code == "trainer_crashed")
    if exit_code == -signal.SIGSEGV:
        assert "SIGSEGV" in error.message
        assert "step 3" in error.message

"""How fast one process may call a grader. Not covered yet: limits shared by all processes of the platform."""

import asyncio


class Pacer:
    """Lets calls begin at most `per_second` times a second, evenly spaced."""

    def __init__(self, per_second: float | None) -> None:
        self._interval = 1.0 / per_second if per_second else 0.0
        self._next_start = 0.0

    async def wait(self) -> None:
        if not self._interval:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next_start)
        self._next_start = start + self._interval
        await asyncio.sleep(start - now)

"""Background tasks of the gateway: started, watched and cancelled together. A failed task is logged and restarted."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0

Work = Callable[[], Coroutine[Any, Any, None]]


class Background:
    """The running background tasks."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None, *, pause_s: float = _PAUSE_S) -> None:
        self._on_failure = on_failure
        self._pause_s = pause_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._patient: set[asyncio.Task[None]] = set()

    def begin(self, name: str, work: Work, *, again: bool = True, is_patient: bool = False) -> asyncio.Task[None]:
        """Run `work`. If `again`, restart it after a failure, but not after it returns.

        A patient task (`is_patient`) is cancelled only once, so that it can finish its cleanup.
        """
        task = asyncio.create_task(self._run(name, work, again=again), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if is_patient:
            self._patient.add(task)
            task.add_done_callback(self._patient.discard)
        return task

    async def end(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        # Cancel repeatedly: a library whose own timeout expires at the same moment may swallow the cancellation.
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
            for task in self._tasks - self._patient:
                task.cancel()

    async def _run(self, name: str, work: Work, *, again: bool) -> None:
        pause_s = self._pause_s
        while True:
            began_at = asyncio.get_running_loop().time()
            try:
                await work()
            except Exception:
                self._on_failure()
                logger.exception("%s failed%s", name, f"; it begins again in {pause_s:g} s" if again else "")
            else:
                return
            if not again:
                return
            await asyncio.sleep(pause_s)
            was_short = asyncio.get_running_loop().time() - began_at < 2 * _LONGEST_PAUSE_S
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S) if was_short else self._pause_s

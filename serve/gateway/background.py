"""Background tasks of the gateway: started, watched and cancelled together. A failed task is logged and restarted."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_PAUSE_S, _MAX_PAUSE_S = 1.0, 30.0

Work = Callable[[], Coroutine[Any, Any, None]]


class Background:
    """The running background tasks."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None, *, pause_s: float = _PAUSE_S) -> None:
        self._on_failure = on_failure
        self._pause_s = pause_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._cancel_once: set[asyncio.Task[None]] = set()

    def begin(self, name: str, work: Work, *, restart: bool = True, cancel_once: bool = False) -> asyncio.Task[None]:
        """Run `work`. If `restart`, restart it after a failure, but not after it returns.

        With `cancel_once` the task is cancelled only once, so that it can finish its cleanup.
        """
        task = asyncio.create_task(self._run(name, work, restart=restart), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if cancel_once:
            self._cancel_once.add(task)
            task.add_done_callback(self._cancel_once.discard)
        return task

    async def end(self) -> None:
        """Cancel all tasks and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        # Cancel repeatedly: a library whose own timeout expires at the same moment may swallow the cancellation.
        while self._tasks:
            await asyncio.wait(self._tasks, timeout=1)
            for task in self._tasks - self._cancel_once:
                task.cancel()

    async def _run(self, name: str, work: Work, *, restart: bool) -> None:
        pause_s = self._pause_s
        while True:
            began_at = asyncio.get_running_loop().time()
            try:
                await work()
            except Exception:
                self._on_failure()
                logger.exception("%s failed%s", name, f"; restarting in {pause_s:g} s" if restart else "")
            else:
                return
            if not restart:
                return
            await asyncio.sleep(pause_s)
            was_short = asyncio.get_running_loop().time() - began_at < 2 * _MAX_PAUSE_S
            pause_s = min(2 * pause_s, _MAX_PAUSE_S) if was_short else self._pause_s

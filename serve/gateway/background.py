"""Tasks that run beside the requests: started, watched and ended together. One that fails is logged and begins again."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

logger = logging.getLogger(__name__)

_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0

Work = Callable[[], Coroutine[Any, Any, None]]


class Background:
    """All of them."""

    def __init__(self, on_failure: Callable[[], None] = lambda: None, *, pause_s: float = _PAUSE_S) -> None:
        self._on_failure = on_failure
        self._pause_s = pause_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._patient: set[asyncio.Task[None]] = set()

    def begin(self, name: str, work: Work, *, again: bool = True, is_patient: bool = False) -> asyncio.Task[None]:
        """Run `work`; `again` when it fails, not when it ends. If it `is_patient` it is cancelled only once, and takes its time."""
        task = asyncio.create_task(self._run(name, work, again=again), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        if is_patient:
            self._patient.add(task)
            task.add_done_callback(self._patient.discard)
        return task

    async def end(self) -> None:
        """Cancel all and wait until they have ended."""
        for task in self._tasks:
            task.cancel()
        # Again and again: a library that is cancelled at the moment its own time runs out may take the one for the other.
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

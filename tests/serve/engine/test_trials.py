"""What hangs, grows or crashes in a trial harms nobody else."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from chorus.serve.engine.trials import BusyError, Trials


def prepare() -> Callable[[bytes], bytes]:
    def run(job: bytes) -> bytes:
        match job:
            case b"spin":
                while True:
                    pass
            case b"sleep":
                time.sleep(60)
            case b"grow":
                return bytes(len(bytearray(1 << 30)) and 1)
            case b"crash":
                os.abort()
            case b"files":
                return b" ".join(bytes(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists())
        return job[::-1]

    return run


@asynccontextmanager
async def trials() -> AsyncIterator[Trials]:
    running = Trials(prepare, cpu_s=0.5, memory_bytes=256 << 20)
    try:
        yield running
    finally:
        running.close()


def test_a_job_gives_its_result_whatever_its_length() -> None:
    async def check() -> None:
        async with trials() as running:
            job = bytes(range(256)) * 4096
            assert await asyncio.gather(running.run(b"abc"), running.run(job)) == [b"cba", job[::-1]]

    asyncio.run(check())


@pytest.mark.parametrize("job", [b"spin", b"sleep", b"grow", b"crash"])
def test_a_job_that_takes_too_much_gives_none_and_the_next_one_runs(job: bytes) -> None:
    async def check() -> None:
        async with trials() as running:
            assert await asyncio.wait_for(running.run(job), 20) is None
            assert await running.run(b"abc") == b"cba"

    asyncio.run(check())


def test_a_job_holds_none_of_the_files_of_the_process_before(tmp_path: Path) -> None:
    async def check() -> None:
        with (tmp_path / "held").open("w"):
            async with trials() as running:
                assert b"held" not in (await running.run(b"files") or b"held")

    asyncio.run(check())


def test_more_jobs_than_can_wait_are_refused_at_once() -> None:
    async def check() -> None:
        async with trials() as running:
            jobs = [asyncio.create_task(running.run(b"sleep")) for _ in range(32)]
            await asyncio.sleep(0)
            with pytest.raises(BusyError):
                await running.run(b"abc")
            for job in jobs:
                job.cancel()
            await asyncio.wait(jobs)
            assert await asyncio.wait_for(running.run(b"abc"), 20) == b"cba"

    asyncio.run(check())


def test_without_the_process_that_forks_nothing_is_tried() -> None:
    async def check() -> None:
        async with trials() as running:
            running.close()
            with pytest.raises(BusyError):
                await running.run(b"abc")

    asyncio.run(check())

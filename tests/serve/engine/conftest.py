"""Engines inside the test process: about ten seconds each, so start one and share it."""

import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest


@contextmanager
def running_engine(directory: Path, **options: Any) -> Iterator[Any]:
    """A vLLM engine over a population, in this process and in float32; stopped and forgotten afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "kv_cache_memory_bytes": 64 << 20,
        "distributed_executor_backend": "uni",
        "max_num_seqs": 64,
        "max_logprobs": -1,
    }
    with patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0"):
        # What vLLM sets for its own workers (LD_PRELOAD among it) is not for the processes of other tests.
        engine = LLM(str(directory), **(settings | options))
    try:
        yield engine
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def engine_directory(tiny_population: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `engine` serves: a copy of the tiny population, whose prior a test may replace."""
    return Path(shutil.copytree(tiny_population, tmp_path_factory.mktemp("engine") / "tiny"))


@pytest.fixture(scope="session")
def engine(engine_directory: Path) -> Iterator[Any]:
    """One engine over the four random members, shared by all engine tests."""
    with running_engine(engine_directory) as running:
        yield running

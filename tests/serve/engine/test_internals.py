"""What is used of vLLM beyond its public hooks, against the vLLM that is installed."""

import os
from pathlib import Path
from typing import Any

import pytest
import vllm
from vllm.model_executor.models import config as models_config

from chorus.population.checkpoint import ARCHITECTURE
from chorus.population.errors import ChorusError
from chorus.serve.engine import internals, plugin

SOURCE = Path(vllm.__file__).parent

pytestmark = pytest.mark.filterwarnings("default")


def test_the_installed_vllm_has_what_is_used_of_it() -> None:
    assert vllm.__version__.startswith(internals.KNOWN_VLLM)
    assert list(internals.differences(SOURCE)) == []


def test_another_vllm_is_found_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        internals,
        "PARAMETERS",
        {
            "sched": {"Scheduler.schedule": "self", "Scheduler.gone": "self", "Scheduler.same": "self, *, a, **more"},
            "nowhere": {"anything": ""},
        },
    )
    (tmp_path / "sched.py").write_text(
        "class Scheduler:\n"
        "    def schedule(self, throttle: bool = False) -> None: ...\n"
        "    async def same(self, *, a: int, **more: int) -> None: ...\n"
    )
    assert list(internals.differences(tmp_path)) == [
        "sched.Scheduler.schedule: found (self, throttle), expected (self)",
        "sched.Scheduler.gone: not found",
        "nowhere: module not found",
    ]


@pytest.mark.skipif("CHORUS_VLLM_SOURCE" not in os.environ, reason="CHORUS_VLLM_SOURCE names no source of a newer vLLM")
def test_what_a_newer_vllm_changes_is_known() -> None:
    changed = {
        line.partition(":")[0].rpartition(".")[2]
        for line in internals.differences(Path(os.environ["CHORUS_VLLM_SOURCE"]))
    }
    # Overridden with any arguments; called with the first three.
    assert changed <= {"_get_local_prefix_cache_hit", "apply_top_k_top_p"}


def test_populations_are_refused_by_other_versions_and_plain_models_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hooks: dict[str, Any] = {}
    monkeypatch.setattr(models_config, "MODELS_CONFIG_MAP", hooks)
    monkeypatch.setattr(vllm, "__version__", "0.33.1")
    plugin.register()
    assert list(hooks) == [ARCHITECTURE]
    with pytest.raises(ChorusError, match=r"vLLM 0\.32\.x, but 0\.33\.1 is installed"):
        hooks[ARCHITECTURE].verify_and_update_config(None)

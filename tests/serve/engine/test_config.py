"""What a population cannot be served with is refused at start, with a sentence that says why."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chorus.population.errors import ChorusError

pytestmark = pytest.mark.filterwarnings("default")  # vLLM's own, while it is imported


def configuration(**changes: Any) -> Any:
    parallel = {"pipeline_parallel_size": 1, "decode_context_parallel_size": 1, "enable_dbo": False}
    return SimpleNamespace(
        parallel_config=SimpleNamespace(**parallel | changes.pop("parallel", {})),
        **{"lora_config": None, "kv_transfer_config": None, "speculative_config": None} | changes,
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora_config": object()}, "LoRA adapters"),
        ({"kv_transfer_config": object()}, "KV transfer"),
        ({"speculative_config": SimpleNamespace(model="ngram")}, "speculative decoding"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel": {"decode_context_parallel_size": 2}}, "context parallelism"),
        ({"parallel": {"enable_dbo": True}}, "dual-batch overlap"),
    ],
)
def test_what_cannot_work_is_refused_and_says_why(changes: dict[str, Any], says: str) -> None:
    from chorus.serve.engine.config import _refuse

    _refuse(configuration())
    with pytest.raises(ChorusError, match=says):
        _refuse(configuration(**changes))


def test_members_that_cannot_be_mixed_are_refused_as_at_init(tiny_population: Path, tmp_path: Path) -> None:
    from chorus.serve.engine.config import check_members

    directory = Path(shutil.copytree(tiny_population, tmp_path / "sliding"))
    check_members(directory)
    config = directory / "members/t0-c02/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sliding_window": 64}))
    with pytest.raises(ChorusError, match=r"member 't0-c02' has a sliding window of 64 tokens in a context of 256"):
        check_members(directory)


def test_attention_that_is_not_full_is_refused_by_layer() -> None:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    from chorus.serve.engine.attention import _set_member_spec

    spec = SlidingWindowSpec(block_size=32, num_kv_heads=2, head_size=32, dtype=torch.float32, sliding_window=64)
    layer = SimpleNamespace(layer_name="member_1.model.layers.0", get_kv_cache_spec=lambda config: spec)
    _set_member_spec(layer, 1)
    with pytest.raises(
        ChorusError, match=r"member 1, layer member_1.model.layers.0: its KV cache is a SlidingWindowSpec"
    ):
        layer.get_kv_cache_spec(None)

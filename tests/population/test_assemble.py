"""Populations out of checkpoints as they lie around: odd files beside the weights, base variants, adapters, mixed architectures."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from chorus.population import assemble, manifest
from chorus.population.checkpoint import check_mixable
from chorus.population.cli import cli
from chorus.population.errors import ChorusError
from tests.worlds import CHAT_TEMPLATE, save_checkpoint, save_member, save_tokenizer


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain checkpoint with its tokenizer and a chat template; copy it."""
    directory = tmp_path_factory.mktemp("tunes") / "tune"
    save_member(directory, seed=0)
    save_tokenizer(directory)
    return directory


@pytest.fixture
def pair(tune: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two copies of it."""
    return tuple(Path(shutil.copytree(tune, tmp_path / name)) for name in ("a", "b"))  # type: ignore[return-value]


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    found = {**(json.loads(path.read_text()) if path.exists() else {}), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def shard(checkpoint: Path) -> None:
    """Write the weights as two files with an index, as large models are saved."""
    weights = load_file(checkpoint / "model.safetensors")
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, checkpoint / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in shards.items() for name in held}
    change(checkpoint / "model.safetensors.index.json", metadata={}, weight_map=weight_map)
    (checkpoint / "model.safetensors").unlink()


def test_weights_in_another_format_beside_the_models_are_not_counted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("consolidated.safetensors", "adapter_model.safetensors"):
        shutil.copyfile(pair[0] / "model.safetensors", pair[0] / name)
    (pair[0] / "adapter_config.json").write_text("{}")
    made = assemble.gather(list(pair), tmp_path / "mine")
    assert made.members[0].num_parameters == made.members[1].num_parameters
    assert list(made.members[0].sha256) == ["model.safetensors"]
    held = {file.name for file in (tmp_path / "mine/members/a").iterdir()}
    assert not {"consolidated.safetensors", "adapter_model.safetensors", "adapter_config.json"} & held


def test_a_sharded_checkpoint_is_what_its_index_names(pair: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copyfile(pair[0] / "model.safetensors", pair[0] / "consolidated.safetensors")
    shard(pair[0])
    made = assemble.gather(list(pair), tmp_path / "mine")
    assert made.members[0].num_parameters == made.members[1].num_parameters
    assert sorted(made.members[0].sha256) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert (tmp_path / "mine/members/a/model.safetensors.index.json").is_file()


def test_an_index_of_other_shards_does_not_outlive_the_single_file(pair: tuple[Path, Path], tmp_path: Path) -> None:
    change(pair[0] / "model.safetensors.index.json", weight_map={"lm_head.weight": "gone.safetensors"})
    assemble.gather(list(pair), tmp_path / "mine")
    assert not (tmp_path / "mine/members/a/model.safetensors.index.json").exists()


def _lose_a_shard(checkpoint: Path) -> None:
    shard(checkpoint)
    (checkpoint / "model-00002-of-00002.safetensors").unlink()


def _lead_the_index_elsewhere(checkpoint: Path) -> None:
    shard(checkpoint)
    change(checkpoint / "model.safetensors.index.json", weight_map={"lm_head.weight": "../b/model.safetensors"})


def _keep_only(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / name)


def _become_an_adapter(checkpoint: Path) -> None:
    _keep_only("adapter_model.safetensors", checkpoint)
    (checkpoint / "config.json").unlink()
    change(checkpoint / "adapter_config.json", base_model_name_or_path="org/base")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_lose_a_shard, "lacks model-00002-of-00002.safetensors"),
        (_lead_the_index_elsewhere, "lists no weight files in its own folder"),
        (lambda c: _keep_only("consolidated.safetensors", c), r"does not load consolidated\.safetensors"),
        (lambda c: _keep_only("pytorch_model.bin", c), "no safetensors weights"),
        (_become_an_adapter, r"a LoRA adapter of org/base.*merge_and_unload\(\)\.save_pretrained"),
        (lambda c: change(c / "config.json", sliding_window=128), "a sliding window of 128 tokens in a context of 256"),
        (lambda c: change(c / "config.json", architectures=["BertForMaskedLM"]), "decoder-only"),
        (lambda c: change(c / "config.json", vocab_size=600), "different vocabularies"),
        (lambda c: (c / "generation_config.json").write_text("[1]"), "contains a list"),
    ],
)
def test_what_would_not_be_served_is_refused_and_nothing_is_written(
    pair: tuple[Path, Path], tmp_path: Path, spoil: Any, says: str
) -> None:
    spoil(pair[1])
    with pytest.raises(ChorusError, match=says) as refused:
        assemble.gather(list(pair), tmp_path / "mine")
    assert str(pair[1]) in str(refused.value)
    assert not (tmp_path / "mine").exists()
    assert not list(tmp_path.glob(".mine*"))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": 8}, None),
        ({"sliding_window": 8}, "sliding window of 8"),
        ({"sliding_window": 8, "use_sliding_window": False}, None),
        ({"sliding_window": 256}, None),
        ({"sliding_window": None}, None),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"kv_lora_rank": None}, None),
        ({"mamba_d_state": 16}, "recurrent"),
        ({"hybrid_override_pattern": "M-M*"}, "recurrent"),
        ({"is_encoder_decoder": True, "architectures": ["T5ForConditionalGeneration"]}, "decoder-only"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "decoder-only"),
        ({"architectures": ["PopulationForCausalLM"]}, "is a population"),
        ({"architectures": ["GPT2LMHeadModel"]}, None),
        ({"quantization_config": {"quant_method": "awq"}}, "one quantisation"),
    ],
)
def test_configs_show_what_an_engine_cannot_mix(config: dict[str, Any], says: str | None) -> None:
    plain = {"architectures": ["LlamaForCausalLM"], "vocab_size": 512}
    both = {"a": plain, "b": {**plain, **config}}
    if says is None:
        check_mixable(both, context_length=256)
    else:
        with pytest.raises(ChorusError, match=rf"^b .*{says}"):
            check_mixable(both, context_length=256)


def test_members_of_different_architectures_are_gathered(tmp_path: Path) -> None:
    for idx, architecture in enumerate(("qwen2", "gpt2")):
        save_checkpoint(tmp_path / architecture, architecture, seed=idx)
    made = assemble.gather([tmp_path / "qwen2", tmp_path / "gpt2"], tmp_path / "mine")
    assert [member.name for member in made.members] == ["qwen2", "gpt2"]


def test_a_base_variant_first_leaves_chats_their_template(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pair[0] / "chat_template.jinja").unlink()
    assemble.gather(list(pair), tmp_path / "mine")
    assert (tmp_path / "mine/chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert f"{pair[0]} has no chat template" in caplog.text


def test_a_template_in_the_tokenizers_settings_counts(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for each in pair:
        (each / "chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ messages }}"}]
    change(pair[1] / "tokenizer_config.json", chat_template=named)
    assemble.gather(list(pair), tmp_path / "mine")
    assert json.loads((tmp_path / "mine/tokenizer_config.json").read_text())["chat_template"] == named


@pytest.mark.parametrize(
    ("template", "says"), [(None, "no checkpoint has a chat template"), ("{{ 1 }}", "which differs from that of")]
)
def test_missing_and_differing_templates_are_told(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, template: str | None, says: str
) -> None:
    for each in pair:
        (each / "chat_template.jinja").unlink()
    if template is not None:
        (pair[0] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        (pair[1] / "chat_template.jinja").write_text(template)
    assemble.gather(list(pair), tmp_path / "mine")
    assert says in caplog.text


def test_an_answer_ends_where_any_member_would_end_it(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(pair[0] / "generation_config.json", eos_token_id=1, temperature=0.7)
    change(pair[1] / "generation_config.json", eos_token_id=[5, 7])
    assemble.gather(list(pair), tmp_path / "mine")
    written = json.loads((tmp_path / "mine/generation_config.json").read_text())
    assert (written["eos_token_id"], written["temperature"]) == ([1, 5, 7], 0.7)
    assert "an answer ends at any of the tokens [1, 5, 7]" in caplog.text
    assert "'temperature': 0.7" in caplog.text


def test_ends_are_found_without_a_generation_config(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for each in pair:
        (each / "generation_config.json").unlink(missing_ok=True)
    change(pair[1] / "config.json", eos_token_id=9)
    assemble.gather(list(pair), tmp_path / "mine")
    assert json.loads((tmp_path / "mine/generation_config.json").read_text()) == {"eos_token_id": [1, 9]}


def test_checkpoints_that_agree_are_gathered_without_a_warning(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assemble.gather(list(pair), tmp_path / "mine")
    assert not caplog.records


def test_the_shortest_context_is_the_populations(
    pair: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    change(pair[0] / "config.json", max_position_embeddings=1024, sliding_window=1024, rope_parameters=scaled)
    made = assemble.gather(list(pair), tmp_path / "mine")
    assert made.context_length == 256
    shared = manifest.read_config(tmp_path / "mine")
    assert shared["max_position_embeddings"] == 256
    assert not {"sliding_window", "rope_parameters", "rope_scaling"} & set(shared)
    assert "the context is the shortest of all checkpoints, 256 tokens" in caplog.text


def test_a_name_that_is_not_allowed_is_one_sentence(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "mine"
    result = CliRunner().invoke(cli, ["population", "init", *map(str, pair), "--out", str(out), "--name", "my team"])
    assert isinstance(result.exception, ChorusError)
    assert "--name 'my team'" in str(result.exception)
    assert "'my-team'" in str(result.exception)
    assert not out.exists()


def test_folders_of_any_names_become_members_of_distinct_names(tune: Path, tmp_path: Path) -> None:
    long = "m" * 80
    homes = ["x/a-3", "x/a", "y/a", "z/a", f"x/{long}", f"y/{long}", "x/...", "y/été"]
    checkpoints = [Path(shutil.copytree(tune, tmp_path / home)) for home in homes]
    made = assemble.gather(checkpoints, tmp_path / "mine")
    names = [member.name for member in made.members]
    assert names[:4] == ["a-3", "a", "a-2", "a-4"]
    assert len(set(names)) == len(names) == 8
    assert manifest.load(tmp_path / "mine") == made

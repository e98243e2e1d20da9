"""Reads a Hugging Face checkpoint on disk: its weight files, tokenizer, end tokens, and whether it can be mixed.

Only headers and JSON are read. Checkpoints that an engine cannot run are refused by their config, so that `chorus population
init` and the engine raise the same error, and `init` needs no engine.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import JsonValue

from chorus.population.errors import ChorusError
from chorus.population.tokens import TextTokenizer

ARCHITECTURE = "PopulationForCausalLM"
Config = Mapping[str, JsonValue]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FULL_ATTENTION = {"full_attention", "attention"}
# The parts that decide how text is split and numbered. Post-processors (which add bos) and padding may differ.
_TOKENIZER_IDENTITY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
# Keys found only in configs of models with state-space, convolution or other recurrent layers.
_RECURRENT = {
    "state_size", "ssm_cfg", "hybrid_override_pattern", "layers_block_type", "block_types", "attn_type_list", "linear_attn_config",
    "full_attention_interval",
}  # fmt: skip
_DECODERS = ("ForCausalLM", "LMHeadModel")


def weight_files(checkpoint: Path) -> dict[Path, int]:
    """The files that Transformers loads weights from, with the number of parameters in each, read from their headers.

    These are `model.safetensors`, else the files listed in `model.safetensors.index.json`. Copies in other formats, such as
    `consolidated.safetensors`, are ignored.

    Raises:
        ChorusError: there are no such files, one is missing or is not safetensors, or the checkpoint is a LoRA adapter.
    """
    single, index = checkpoint / SINGLE, checkpoint / INDEX
    if single.is_file():
        files = [single]
    elif index.is_file():
        shards = read_object(index).get("weight_map")
        names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ChorusError(
                f"{index} lists no weight files in its own folder. Save the model again with `save_pretrained`."
            )
        files = [checkpoint / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ChorusError(
                f"{checkpoint} lacks {', '.join(missing)}, listed in {INDEX}. Copy all files of the checkpoint."
            )
    else:
        raise ChorusError(_missing_weights_message(checkpoint))
    return {file: count_parameters(file) for file in files}


def _missing_weights_message(checkpoint: Path) -> str:
    if (checkpoint / "adapter_config.json").is_file():
        base = read_object(checkpoint / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{checkpoint} is a LoRA adapter of {base}, not a full checkpoint. Merge it into its base and use the result: "
            f'`AutoPeftModelForCausalLM.from_pretrained("{checkpoint}").merge_and_unload().save_pretrained("MERGED")`, and save '
            "the tokenizer there too."
        )
    if others := sorted(file.name for file in checkpoint.glob("*.safetensors")):
        return (
            f"{checkpoint} has neither {SINGLE} nor {INDEX}. Transformers does not load {', '.join(others)} by default. "
            "Load the model as its authors describe, then save it with `model.save_pretrained(DIR)`."
        )
    return (
        f"{checkpoint} has no safetensors weights, the only format that is read. Convert other formats with "
        "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`."
    )


def count_parameters(safetensors: Path) -> int:
    """Number of elements in a safetensors file, from its header alone.

    Raises:
        ChorusError: the header cannot be read: the file is truncated or in another format.
    """
    try:
        with safetensors.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > safetensors.stat().st_size:
                raise ValueError(f"a header of {length} bytes does not fit in the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise ChorusError(f"{safetensors} is not a safetensors file ({error}). Restore or convert it.") from None
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


def check_mixable(configs: Mapping[str, Config], *, context_length: int) -> None:
    """Refuse members that an engine cannot mix. `configs` maps names to configs; contexts have at most `context_length` tokens.

    Architectures may differ: an engine builds each member from its own config. All members must be decoders with full attention,
    and share one vocabulary and one quantisation.

    Raises:
        ChorusError: names the first member that cannot be mixed, and the reason.
    """
    first, first_config = next(iter(configs.items()))
    for name, config in configs.items():
        if reason := _unsupported_reason(config, context_length):
            raise ChorusError(f"{name} {reason}")
        for key, meaning in (
            ("vocab_size", "distributions over different vocabularies cannot be mixed"),
            ("quantization_config", "an engine loads all members with one quantisation"),
        ):
            if config.get(key) != first_config.get(key):
                raise ChorusError(
                    f"{name} has {key} {config.get(key)}, but {first} has {first_config.get(key)}: {meaning}."
                )


def _unsupported_reason(config: Config, context_length: int) -> str | None:
    architectures = config.get("architectures") or []
    if ARCHITECTURE in _strings(architectures):
        return "is a population. Use its members instead, the folders in its `members`."
    if config.get("is_encoder_decoder") or any(not _is_decoder(name) for name in _strings(architectures)):
        return f"is a {', '.join(_strings(architectures))}: expected a decoder-only language model (...ForCausalLM)."
    kinds = sorted(set(_strings(config.get("layer_types"))) - _FULL_ATTENTION)
    if kinds:
        return f"has layers of type {', '.join(kinds)}; only full attention is supported."
    if config.get("kv_lora_rank"):
        return "has latent attention (kv_lora_rank); only full attention is supported."
    if recurrent := [key for key in config if key in _RECURRENT or key.startswith("mamba_")]:
        return f"has recurrent layers ({recurrent[0]}); only full attention is supported."
    if (window := sliding_window(config)) and window < context_length:
        return (
            f"has a sliding window of {window} tokens in a context of {context_length}; only full attention is supported. To use "
            f"it within its window, set max_position_embeddings to {window} and sliding_window to null in its config.json."
        )
    return None


def _is_decoder(architecture: str) -> bool:
    return any(part in architecture for part in _DECODERS)


def sliding_window(config: Config) -> int | None:
    """The sliding window of all layers, in tokens; None for full attention."""
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True) and not config.get("layer_types")
    return window if isinstance(window, int) and window > 0 and is_used else None


def context_length(config: Config, checkpoint: Path) -> int:
    """The maximum sequence length of a checkpoint, in tokens.

    Raises:
        ChorusError: its config does not contain it.
    """
    key = context_key(config)
    value = config.get(key)
    if not isinstance(value, int):
        raise ChorusError(f"{checkpoint / 'config.json'} has no {key}: expected a decoder-only language model.")
    return value


def context_key(config: Config) -> str:
    """The config key of the context length."""
    return (
        "n_positions"
        if "max_position_embeddings" not in config and "n_positions" in config
        else "max_position_embeddings"
    )


def tokenizer_identity(checkpoint: Path) -> JsonValue:
    """The parts of a tokenizer that must be equal for two checkpoints to encode text alike.

    Raises:
        ChorusError: there is no fast tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise ChorusError(f"{checkpoint} has no tokenizer.json: expected a fast Hugging Face tokenizer.")
    tokenizer = read_object(path)
    return {key: tokenizer.get(key) for key in _TOKENIZER_IDENTITY}


def chat_template(checkpoint: Path) -> str | None:
    """The chat template that `/v1/chat/completions` would use, or None."""
    path = checkpoint / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_optional(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # named templates, as older versions of Transformers save them
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def end_tokens(checkpoint: Path, config: Config) -> list[int]:
    """Ids of the tokens that end an answer: those in the generation config, else in the config, plus the tokenizer's eos."""
    given = read_optional(checkpoint / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ids = {token for token in (given if isinstance(given, Sequence) else [given]) if isinstance(token, int)}
    eos = TextTokenizer.load(checkpoint).eos
    return sorted(ids if eos is None else ids | {eos})


def read_object(path: Path) -> dict[str, JsonValue]:
    """Read a JSON object from a file.

    Raises:
        ChorusError: the file is not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChorusError(f"{path} is not JSON ({error}). Restore it.") from None
    if not isinstance(found, dict):
        raise ChorusError(f"{path} contains a {type(found).__name__}; expected an object. Restore it.")
    return found


def read_optional(path: Path) -> dict[str, JsonValue]:
    """As `read_object`, but empty if the file does not exist."""
    return read_object(path) if path.is_file() else {}


def _strings(value: JsonValue) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []

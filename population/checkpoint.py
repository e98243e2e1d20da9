"""A Hugging Face checkpoint as it lies on disk: its weights, its tokenizer, how its answers end, and whether it can be mixed.

It reads headers and JSON only. What an engine cannot run is refused here by the config alone, so that `chorus population init`
and the engine give the same sentence, the first of them without an engine.
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
# What makes two tokenizers one: how text is cut and numbered. Post-processors (who adds bos) and padding may differ.
_TOKENIZER_IDENTITY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")
# Keys that only configs of models with state-space, convolution or other recurrent layers have.
_RECURRENT = {
    "state_size", "ssm_cfg", "hybrid_override_pattern", "layers_block_type", "block_types", "attn_type_list", "linear_attn_config",
    "full_attention_interval",
}  # fmt: skip
_DECODERS = ("ForCausalLM", "LMHeadModel")


def weight_files(checkpoint: Path) -> dict[Path, int]:
    """The files that Transformers loads the weights from, and the number of parameters in each, from their headers.

    That is `model.safetensors`, else the files that `model.safetensors.index.json` names. Copies in other formats that lie
    beside them (`consolidated.safetensors`) are not the model's.

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
            raise ChorusError(f"{index} names no weight files beside it. Save the model again with `save_pretrained`.")
        files = [checkpoint / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ChorusError(f"{checkpoint} lacks {', '.join(missing)}, which {INDEX} names. Copy all of its files.")
    else:
        raise ChorusError(_why_no_weights(checkpoint))
    return {file: count_parameters(file) for file in files}


def _why_no_weights(checkpoint: Path) -> str:
    if (checkpoint / "adapter_config.json").is_file():
        base = read_object(checkpoint / "adapter_config.json").get("base_model_name_or_path")
        return (
            f"{checkpoint} is a LoRA adapter of {base}, not a whole checkpoint. Merge it into its base and give the result: "
            f'`AutoPeftModelForCausalLM.from_pretrained("{checkpoint}").merge_and_unload().save_pretrained("MERGED")`, and save '
            "the tokenizer there too."
        )
    if others := sorted(file.name for file in checkpoint.glob("*.safetensors")):
        return (
            f"{checkpoint} has neither {SINGLE} nor {INDEX}, but {', '.join(others)}, which Transformers does not load by "
            "itself. Load the model as its authors describe and save it with `model.save_pretrained(DIR)`."
        )
    return (
        f"{checkpoint} holds no safetensors weights. Only safetensors are read; convert others with "
        "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)`."
    )


def count_parameters(safetensors: Path) -> int:
    """Number of elements in a safetensors file, from its header alone.

    Raises:
        ChorusError: the header cannot be read: the file is cut short or is of another format.
    """
    try:
        with safetensors.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > safetensors.stat().st_size:
                raise ValueError(f"a header of {length} bytes does not fit into the file")
            header = json.loads(file.read(length))
    except (struct.error, ValueError) as error:
        raise ChorusError(f"{safetensors} is not a safetensors file ({error}). Restore or convert it.") from None
    return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


def check_mixable(configs: Mapping[str, Config], *, context_length: int) -> None:
    """Refuse members that no engine can mix, by their configs (by name), in contexts of at most `context_length` tokens.

    Architectures may differ: an engine builds each member from its own config. All must be decoders with full attention, give
    distributions over one vocabulary, and be quantised alike.

    Raises:
        ChorusError: with the first such member and why.
    """
    first, first_config = next(iter(configs.items()))
    for name, config in configs.items():
        if why := _why_not_full_attention(config, context_length):
            raise ChorusError(f"{name} {why}")
        for key, meaning in (
            ("vocab_size", "distributions over different vocabularies cannot be mixed"),
            ("quantization_config", "an engine reads the weights of all members in one format"),
        ):
            if config.get(key) != first_config.get(key):
                raise ChorusError(
                    f"{name} has {key} {config.get(key)}, {first} has {first_config.get(key)}: {meaning}."
                )


def _why_not_full_attention(config: Config, context_length: int) -> str | None:
    architectures = config.get("architectures") or []
    if ARCHITECTURE in _strings(architectures):
        return "is a population. Give its members instead, the folders in its `members`."
    if config.get("is_encoder_decoder") or any(not _is_decoder(name) for name in _strings(architectures)):
        return f"is a {', '.join(_strings(architectures))}: decoder-only language models (...ForCausalLM) are expected."
    kinds = sorted(set(_strings(config.get("layer_types"))) - _FULL_ATTENTION)
    if kinds:
        return f"has layers of the kind {', '.join(kinds)}, and only full attention can be mixed so far."
    if config.get("kv_lora_rank"):
        return "has latent attention (kv_lora_rank), and only full attention can be mixed so far."
    if recurrent := [key for key in config if key in _RECURRENT or key.startswith("mamba_")]:
        return f"has recurrent layers ({recurrent[0]}), and only full attention can be mixed so far."
    if (window := sliding_window(config)) and window < context_length:
        return (
            f"has a sliding window of {window} tokens in a context of {context_length}, and only full attention can be mixed so "
            f"far. Within its window it can be: set max_position_embeddings to {window} and sliding_window to null in its "
            "config.json."
        )
    return None


def _is_decoder(architecture: str) -> bool:
    return any(part in architecture for part in _DECODERS)


def sliding_window(config: Config) -> int | None:
    """Tokens that every layer looks back on; None where it is all of them."""
    window = config.get("sliding_window")
    is_used = config.get("use_sliding_window", True) and not config.get("layer_types")
    return window if isinstance(window, int) and window > 0 and is_used else None


def context_length(config: Config, checkpoint: Path) -> int:
    """Longest sequence that a checkpoint was made for, in tokens.

    Raises:
        ChorusError: its config does not tell.
    """
    key = context_key(config)
    value = config.get(key)
    if not isinstance(value, int):
        raise ChorusError(f"{checkpoint / 'config.json'} names no {key}: a decoder-only language model is expected.")
    return value


def context_key(config: Config) -> str:
    """The key under which a config keeps the length of its context."""
    return (
        "n_positions"
        if "max_position_embeddings" not in config and "n_positions" in config
        else "max_position_embeddings"
    )


def tokenizer_identity(checkpoint: Path) -> JsonValue:
    """What two checkpoints must have in common for the same text to be the same tokens.

    Raises:
        ChorusError: there is no fast tokenizer.
    """
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise ChorusError(f"{checkpoint} has no tokenizer.json: a fast Hugging Face tokenizer is expected.")
    tokenizer = read_object(path)
    return {key: tokenizer.get(key) for key in _TOKENIZER_IDENTITY}


def chat_template(checkpoint: Path) -> str | None:
    """The text of the template that `/v1/chat/completions` would use; None without one."""
    path = checkpoint / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_optional(checkpoint / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several by name, as older versions of Transformers save them
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def end_tokens(checkpoint: Path, config: Config) -> list[int]:
    """Ids of the tokens that end an answer: those of the generation config, else of the config; and the tokenizer's eos."""
    given = read_optional(checkpoint / "generation_config.json").get("eos_token_id", config.get("eos_token_id"))
    ids = {token for token in (given if isinstance(given, Sequence) else [given]) if isinstance(token, int)}
    eos = TextTokenizer.load(checkpoint).eos
    return sorted(ids if eos is None else ids | {eos})


def read_object(path: Path) -> dict[str, JsonValue]:
    """What a JSON file holds.

    Raises:
        ChorusError: it is not an object in JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ChorusError(f"{path} is not JSON ({error}). Restore it.") from None
    if not isinstance(found, dict):
        raise ChorusError(f"{path} holds a {type(found).__name__} where an object was expected. Restore it.")
    return found


def read_optional(path: Path) -> dict[str, JsonValue]:
    """The same; empty where the file does not exist."""
    return read_object(path) if path.is_file() else {}


def _strings(value: JsonValue) -> list[str]:
    return [part for part in value if isinstance(part, str)] if isinstance(value, list) else []

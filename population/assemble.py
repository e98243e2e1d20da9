"""Making a population directory: describing members, writing the files that all of them share, gathering checkpoints."""

import json
import math
import re
import shutil
import struct
import tempfile
from importlib.metadata import version
from pathlib import Path

from pydantic import JsonValue

from chorus.population.errors import ChorusError
from chorus.population.files import sha256, write_text
from chorus.population.manifest import Member, Population, Provenance, now, read_config, save

ARCHITECTURE = "PopulationForCausalLM"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
_CHECKPOINT_SUFFIXES = {".safetensors", ".json", ".jinja", ".model", ".txt"}
# What makes two tokenizers one: how text is cut and numbered. Post-processors (who adds bos) and padding may differ.
_TOKENIZER_IDENTITY = ("model", "added_tokens", "normalizer", "pre_tokenizer", "decoder")


def chorus_version() -> str:
    """The version of the installed package."""
    return version("chorus-lm")


def describe_member(directory: Path, path: str, name: str, **origin: JsonValue) -> Member:
    """A manifest entry for the checkpoint at `directory / path`: digests and parameter count are read from its files.

    `origin` holds the optional fields of `Member` (trajectory, cycle, epochs, teacher).
    """
    weights = _weight_files(directory / path)
    return Member.model_validate(
        {
            "name": name,
            "path": path,
            "sha256": {file.name: sha256(file) for file in weights},
            "num_parameters": sum(weights.values()),
            **origin,
        }
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


def write_shared_files(directory: Path, first_member: Path, tokenizer: Path) -> None:
    """Write what serves the whole population: its tokenizer, and a config.json that names our architecture.

    The config is the first member's, so that whoever reads it (vLLM's planning of memory, a client) sees true sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        source = tokenizer / name
        if source.is_file() and source.resolve() != (directory / name).resolve():
            shutil.copyfile(source, directory / name)
    config = {**read_config(first_member), "architectures": [ARCHITECTURE]}
    config.pop("auto_map", None)
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def gather(checkpoints: list[Path], out: Path, *, name: str | None = None) -> Population:
    """Make a population from existing checkpoints that share a vocabulary, under uniform tiers.

    Everything is checked before anything is copied, and `out` appears only when it is complete.

    Raises:
        ChorusError: a checkpoint is incomplete or does not match the first, or `out` exists and is not empty.
    """
    if out.exists() and any(out.iterdir()):
        raise ChorusError(f"{out} exists and is not empty. Give another --out, or remove it.")
    configs = [read_config(checkpoint) for checkpoint in checkpoints]
    _check_compatible(checkpoints, configs)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        directory = Path(temporary) / out.name
        members = []
        for member_name, checkpoint in zip(_unique_names(checkpoints), checkpoints, strict=True):
            path = f"members/{member_name}"
            (directory / path).mkdir(parents=True)
            for file in sorted(checkpoint.iterdir()):
                if file.is_file() and file.suffix in _CHECKPOINT_SUFFIXES:
                    shutil.copyfile(file, directory / path / file.name)
            members.append(describe_member(directory, path, member_name))
        write_shared_files(directory, directory / members[0].path, checkpoints[0])
        source = ", ".join(str(path) for path in checkpoints)
        population = Population(
            name=name or as_name(out.resolve().name),
            tokenizer_sha256=sha256(directory / "tokenizer.json"),
            vocab_size=_int(configs[0], "vocab_size", checkpoints[0]),
            context_length=min(_context_length(c, p) for c, p in zip(configs, checkpoints, strict=True)),
            members=tuple(members),
            provenance=Provenance(created_at=now(), chorus_version=chorus_version(), source=source),
        ).with_uniform_tiers()
        save(population, directory)
        if out.exists():
            out.rmdir()
        directory.rename(out)
    return population


def _check_compatible(checkpoints: list[Path], configs: list[dict[str, JsonValue]]) -> None:
    """Refuse checkpoints whose distributions could not be mixed, or whose weights cannot be read."""
    first, first_config = checkpoints[0], configs[0]
    identity = _tokenizer_identity(first)
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        if config.get("architectures") == [ARCHITECTURE]:
            raise ChorusError(f"{checkpoint} is a population. Give its members instead: {checkpoint / 'members'}/...")
        for key, why in (
            ("vocab_size", "distributions over different vocabularies cannot be mixed"),
            ("architectures", "all members of a population share one architecture"),
        ):
            if config.get(key) != first_config.get(key):
                raise ChorusError(
                    f"{checkpoint} has {key} {config.get(key)}, {first} has {first_config.get(key)}: {why}."
                )
        if _tokenizer_identity(checkpoint) != identity:
            raise ChorusError(
                f"{checkpoint} has another tokenizer than {first}: the same text would be other tokens to each member, "
                "and their distributions could not be mixed."
            )
        _weight_files(checkpoint)


def _weight_files(checkpoint: Path) -> dict[Path, int]:
    """The weight files of a checkpoint and the number of parameters in each, from their headers."""
    files = {file: count_parameters(file) for file in sorted(checkpoint.glob("*.safetensors"))}
    if not files:
        raise ChorusError(
            f"{checkpoint} holds no safetensors weights. Only safetensors are read; "
            "convert others with `model.save_pretrained(DIR, safe_serialization=True)`."
        )
    return files


def _context_length(config: dict[str, JsonValue], checkpoint: Path) -> int:
    key = "max_position_embeddings" if "max_position_embeddings" in config else "n_positions"
    return _int(config, key, checkpoint)


def _int(config: dict[str, JsonValue], key: str, checkpoint: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise ChorusError(f"{checkpoint / 'config.json'} names no {key}: a decoder-only language model is expected.")
    return value


def _tokenizer_identity(checkpoint: Path) -> JsonValue:
    path = checkpoint / "tokenizer.json"
    if not path.is_file():
        raise ChorusError(f"{checkpoint} has no tokenizer.json: a fast Hugging Face tokenizer is expected.")
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    return {key: tokenizer.get(key) for key in _TOKENIZER_IDENTITY}


def as_name(text: str) -> str:
    """The nearest allowed name of a population or member to any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:63] or "population"


def _unique_names(checkpoints: list[Path]) -> list[str]:
    names: list[str] = []
    for checkpoint in checkpoints:
        base = as_name(checkpoint.resolve().name)
        taken = sum(name == base or name.startswith(f"{base}-") for name in names)
        names.append(base if base not in names else f"{base}-{taken + 1}")
    return names

"""Makes a population directory: describes members, writes the files that they share, copies checkpoints."""

import itertools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from pydantic import JsonValue, TypeAdapter, ValidationError

from chorus.population import checkpoint as on_disk
from chorus.population.checkpoint import ARCHITECTURE, Config
from chorus.population.errors import ChorusError
from chorus.population.files import sha256, write_text
from chorus.population.manifest import Member, Name, Population, Provenance, now, read_config, save

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "generation_config.json",
)  # fmt: skip
_CHECKPOINT_SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")

logger = logging.getLogger(__name__)
T = TypeVar("T")


def chorus_version() -> str:
    """The version of the installed package."""
    return version("chorus-lm")


def describe_member(directory: Path, path: str, name: str, **origin: JsonValue) -> Member:
    """A manifest entry for the checkpoint at `directory / path`, with digests and parameter counts read from its files.

    `origin` holds the optional fields of `Member` (trajectory, cycle, epochs, teacher).
    """
    weights = on_disk.weight_files(directory / path)
    return Member.model_validate(
        {
            "name": name,
            "path": path,
            "sha256": {file.name: sha256(file) for file in weights},
            "num_parameters": sum(weights.values()),
            **origin,
        }
    )


def write_shared_files(directory: Path, first_member: Path, tokenizer: Path) -> None:
    """Write the files of the population itself: its tokenizer, and a config.json that names our architecture.

    The config is a copy of the first member's, so that its readers (vLLM's memory planning, clients) see real sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        source = tokenizer / name
        if source.is_file() and source.resolve() != (directory / name).resolve():
            shutil.copyfile(source, directory / name)
    config = {**read_config(first_member), "architectures": [ARCHITECTURE]}
    config.pop("auto_map", None)
    config.pop(
        "sliding_window", None
    )  # vLLM would apply it to every member; no member has a window shorter than the context
    write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")


def gather(checkpoints: list[Path], out: Path, *, name: str | None = None) -> Population:
    """Make a population with uniform tiers from existing checkpoints that share a vocabulary.

    All checks run before the first copy, and `out` appears only once it is complete. A population has one tokenizer, one set of
    end tokens and one context length. Where the checkpoints differ in these, a warning is logged, and the population gets the
    tokenizer files of the first checkpoint with a chat template, the union of all end tokens, and the shortest context.

    Raises:
        ChorusError: the name is not allowed, a checkpoint is incomplete, they cannot be mixed, or `out` exists and is not empty.
    """
    name = as_name(out.resolve().name) if name is None else _checked_name(name)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ChorusError(f"{out} exists and is not empty. Give another --out, or remove it.")
    weights = [on_disk.weight_files(checkpoint) for checkpoint in checkpoints]
    configs = {str(checkpoint): read_config(checkpoint) for checkpoint in checkpoints}
    context_length = min(on_disk.context_length(configs[str(each)], each) for each in checkpoints)
    on_disk.check_mixable(configs, context_length=context_length)
    vocab_size = configs[str(checkpoints[0])]["vocab_size"]
    assert isinstance(vocab_size, int)
    _check_tokenizers(checkpoints)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        directory = Path(temporary) / out.name
        members = []
        for member_name, checkpoint, files in zip(_unique_names(checkpoints), checkpoints, weights, strict=True):
            path = f"members/{member_name}"
            _copy(checkpoint, list(files), directory / path)
            members.append(describe_member(directory, path, member_name))
        source = _tokenizer_source(checkpoints)
        write_shared_files(directory, directory / members[0].path, source)
        _reconcile(directory, checkpoints, configs, source, context_length)
        population = Population(
            name=name,
            tokenizer_sha256=sha256(directory / "tokenizer.json"),
            vocab_size=vocab_size,
            context_length=context_length,
            members=tuple(members),
            provenance=Provenance(
                created_at=now(), chorus_version=chorus_version(), source=", ".join(map(str, checkpoints))
            ),
        ).with_uniform_tiers()
        save(population, directory)
        if out.exists():
            out.rmdir()
        directory.rename(out)
    return population


def _check_tokenizers(checkpoints: list[Path]) -> None:
    first, *others = checkpoints
    identity = on_disk.tokenizer_identity(first)
    for checkpoint in others:
        if on_disk.tokenizer_identity(checkpoint) != identity:
            raise ChorusError(
                f"{checkpoint} and {first} have different tokenizers: they split the same text into different tokens, "
                "so their distributions cannot be mixed."
            )


def _copy(checkpoint: Path, weights: list[Path], to: Path) -> None:
    """Copy a checkpoint, without weights in other formats, adapters and optimiser states."""
    to.mkdir(parents=True)
    others = [file for file in checkpoint.iterdir() if file.is_file() and file.suffix in _CHECKPOINT_SUFFIXES]
    for file in [*weights, *others]:
        if not file.name.startswith("adapter_"):
            shutil.copyfile(file, to / file.name)
    if (to / on_disk.SINGLE).is_file():
        (to / on_disk.INDEX).unlink(missing_ok=True)  # its shards were not copied


def _tokenizer_source(checkpoints: list[Path]) -> Path:
    """The checkpoint whose tokenizer files the population uses: the first with a chat template, else the first."""
    templates = {checkpoint: on_disk.chat_template(checkpoint) for checkpoint in checkpoints}
    source = next((checkpoint for checkpoint, template in templates.items() if template is not None), checkpoints[0])
    if templates[source] is None:
        logger.warning("no checkpoint has a chat template: chat requests will be refused, completions work")
    elif differing := [str(c) for c, template in templates.items() if template not in (None, templates[source])]:
        logger.warning("using the chat template of %s, which differs from that of %s", source, ", ".join(differing))
    elif source != checkpoints[0]:
        logger.warning(
            "%s has no chat template: using the template and tokenizer settings of %s", checkpoints[0], source
        )
    return source


def _reconcile(
    directory: Path, checkpoints: list[Path], configs: Mapping[str, Config], tokenizer_source: Path, context_length: int
) -> None:
    """Adapt the shared files to all members, and warn about differences between checkpoints."""
    contexts = _each(checkpoints, lambda each: on_disk.context_length(configs[str(each)], each))
    if len(set(contexts.values())) > 1:
        logger.warning(
            "the context is the shortest of all checkpoints, %d tokens; %s", context_length, _listed(contexts)
        )
        config = read_config(directory)
        config[on_disk.context_key(config)] = context_length
        for key in (
            "rope_scaling",
            "rope_parameters",
        ):  # vLLM would extend the context by them again; members keep their own
            config.pop(key, None)
        write_text(directory / "config.json", json.dumps(config, indent=2) + "\n")

    additions = _each(checkpoints, lambda each: on_disk.read_object(each / "tokenizer.json").get("post_processor"))
    if any(addition != additions[tokenizer_source] for addition in additions.values()):
        logger.warning(
            "checkpoints add different special tokens to a text (post_processor); using those of %s", tokenizer_source
        )

    ends = _each(checkpoints, lambda each: on_disk.end_tokens(each, configs[str(each)]))
    every_end = sorted(set().union(*ends.values()))
    if any(end != every_end for end in ends.values()):
        logger.warning(
            "an answer ends at any of the tokens %s, the end tokens of all checkpoints; %s", every_end, _listed(ends)
        )

    given = _each(checkpoints, lambda each: on_disk.read_optional(each / "generation_config.json"))
    source = next((each for each in (tokenizer_source, *checkpoints) if given[each]), tokenizer_source)
    sampling = _each(checkpoints, lambda each: {key: given[each][key] for key in _SAMPLING if key in given[each]})
    if any(each != sampling[source] for each in sampling.values()):
        logger.warning("default sampling parameters are those of %s; %s", source, _listed(sampling))
    if every_end:
        write_text(
            directory / "generation_config.json",
            json.dumps({**given[source], "eos_token_id": every_end}, indent=2) + "\n",
        )


def _each(checkpoints: list[Path], of: Callable[[Path], T]) -> dict[Path, T]:
    return {checkpoint: of(checkpoint) for checkpoint in checkpoints}


def _listed(values: Mapping[Path, object]) -> str:
    return ", ".join(f"{checkpoint} has {value}" for checkpoint, value in values.items())


def _checked_name(name: str) -> str:
    try:
        return TypeAdapter(Name).validate_python(name)
    except ValidationError:
        raise ChorusError(
            f"--name {name!r} is not a valid population name. Use at most 63 letters, digits, `_`, `.` and `-`, starting with a "
            f"letter or digit, for example {as_name(name)!r}."
        ) from None


def as_name(text: str) -> str:
    """Turn any text into a valid name of a population or member."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._")[:63] or "population"


def _unique_names(checkpoints: list[Path]) -> list[str]:
    names: list[str] = []
    for checkpoint in checkpoints:
        base = name = as_name(checkpoint.resolve().name)
        for number in itertools.count(2):
            if name not in names:
                break
            name = f"{base[:58]}-{number}"
        names.append(name)
    return names

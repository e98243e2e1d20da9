"""Small worlds for tests: populations with random members, made in a second, with a real tokenizer.

Members are drawn with large weights, so that their distributions are peaked and differ: a mixture of near-uniform members would
hide a wrong weight.
"""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from chorus.population import assemble, manifest
from chorus.population.corpus import Document, read_documents
from chorus.population.files import sha256
from chorus.population.manifest import Population, Provenance, Tier
from chorus.population.tokens import TextTokenizer, TokenSplit, split_path

BOS, EOS = "<|bos|>", "<|eos|>"
CHAT_TEMPLATE = """\
{% for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def some_documents(count: int = 40, max_characters: int = 6_000) -> list[Document]:
    """Real text that is on every machine: short modules of the standard library."""
    short = (d for d in read_documents("stdlib") if 500 < len(d.text) <= max_characters)
    return list(islice(short, count))


def save_tokenizer(directory: Path, vocab_size: int = 512) -> TextTokenizer:
    """Train a byte-level BPE of exactly `vocab_size` tokens on standard-library text and save it as Hugging Face does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in some_documents()), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(directory)
    return TextTokenizer.load(directory)


def save_member(
    directory: Path, seed: int, *, vocab_size: int = 512, context_length: int = 256, layers: int = 2, width: int = 64
) -> None:
    """A random Llama checkpoint in float32 with peaked distributions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=context_length,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def save_checkpoint(directory: Path, architecture: str, seed: int, *, layers: int = 2) -> None:
    """A random checkpoint of another architecture with the tests' tokenizer beside it, as fine-tunes of one base lie around."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1, "dtype": "float32"}
    config = {
        "qwen2": lambda: Qwen2Config(
            **sizes, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        ),
        "gpt2": lambda: GPT2Config(**sizes, n_embd=64, n_layer=layers, n_head=2, n_positions=256),
    }[architecture]()  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    save_tokenizer(directory)


def make_population(
    directory: Path, *, num_members: int = 4, name: str = "tiny", splits: bool = True, context_length: int = 256
) -> Population:
    """A complete population under nested tiers `economy` (1), `standard` (2) and `max` (all) with uneven weights."""
    tokenizer = save_tokenizer(directory)
    members = []
    for idx in range(num_members):
        member_name = f"t0-c{idx:02d}"
        save_member(directory / "members" / member_name, seed=idx, context_length=context_length)
        members.append(
            assemble.describe_member(directory, f"members/{member_name}", member_name, trajectory=0, cycle=idx)
        )
    assemble.write_shared_files(directory, directory / members[0].path, directory)
    if splits:
        documents = [tokenizer.encode_document(d.text) for d in some_documents()]
        for part, split in enumerate(("fitness", "selection", "test")):
            TokenSplit.from_documents(documents[part::3]).save(split_path(directory, split))
    population = Population(
        name=name,
        tokenizer_sha256=sha256(directory / "tokenizer.json"),
        vocab_size=tokenizer.vocab_size,
        context_length=context_length,
        members=tuple(members),
        provenance=Provenance(created_at=manifest.now(), chorus_version=assemble.chorus_version(), source="tests"),
    )
    population = with_nested_tiers(population)
    manifest.save(population, directory)
    return population


def with_nested_tiers(population: Population) -> Population:
    """The same members under tiers `economy` (1), `standard` (2) and `max` (all), with weights in proportion to 1, 2, 3, ..."""
    names = tuple(member.name for member in population.members)
    tiers = []
    for tier_name, size in {"economy": 1, "standard": 2, "max": len(names)}.items():
        weights = tuple((idx + 1) / (size * (size + 1) / 2) for idx in range(size))
        cost = population.relative_cost(names[:size])
        tiers.append(Tier(name=tier_name, members=names[:size], weights=weights, relative_cost=cost))
    return population.model_copy(update={"tiers": tuple(tiers)})


class SmallDisk:
    """A file system of a few megabytes that can be filled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fill(self, *, leaving: int = 0) -> None:
        """Leave so many bytes, in whole blocks."""
        self.make_room()
        with (self.path / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(65_536)):
                pass
        size = (self.path / "filler").stat().st_size
        os.truncate(self.path / "filler", max(0, size - leaving))

    def make_room(self) -> None:
        """Take the filling out."""
        (self.path / "filler").unlink(missing_ok=True)


@contextmanager
def small_disk(path: Path, *, megabytes: int) -> Iterator[SmallDisk]:
    """A tmpfs at `path`; the test is skipped where none may be mounted."""
    path.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)]
    try:
        allowed = os.geteuid() == 0 and subprocess.run(mounting, check=False, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("only root may mount a small disk")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)

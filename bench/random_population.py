"""Makes a population of random members in a minute, for measurements that depend on the members' size only.

    python -m bench.random_population OUT [--members 8] [--layers 4] [--width 256] [--vocab-size 32000] [--spread 1.0]

A spread below 1 makes members more alike; at 0 they are copies of the first. Tiers are nested, with 1, 2, 4 ... members and equal
weights. The generated text is meaningless.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from chorus.population import assemble, manifest
from chorus.population.corpus import read_documents
from chorus.population.files import sha256
from chorus.population.manifest import Population, Provenance, Tier


def make(
    directory: Path,
    *,
    num_members: int = 8,
    layers: int = 4,
    width: int = 256,
    vocab_size: int = 32_000,
    spread: float = 1.0,
) -> Population:
    """Write the population to `directory`; see the module's docstring."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in read_documents("stdlib")), trainer)
    shared = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>")
    members = []
    for idx in range(num_members):
        torch.manual_seed(idx)
        config = LlamaConfig(
            vocab_size=vocab_size, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=width // 32, num_key_value_heads=width // 32, max_position_embeddings=1024,
            initializer_range=0.1, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, dtype="float32",
        )  # fmt: skip
        path = f"members/m{idx}"
        model = LlamaForCausalLM(config)
        if idx == 0:
            first = {name: value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict({name: torch.lerp(first[name], own, spread) for name, own in model.state_dict().items()})
        model.save_pretrained(directory / path)
        members.append(assemble.describe_member(directory, path, f"m{idx}"))
    shared.save_pretrained(directory)
    assemble.write_shared_files(directory, directory / members[0].path, directory)
    population = Population(
        name=directory.name,
        tokenizer_sha256=sha256(directory / "tokenizer.json"),
        vocab_size=vocab_size,
        context_length=1024,
        members=tuple(members),
        provenance=Provenance(created_at=manifest.now(), chorus_version=assemble.chorus_version(), source="random"),
    )
    names, tiers, size = [member.name for member in members], [], 1
    while size <= num_members:
        tiers.append(
            Tier(
                name=f"k{size}", members=tuple(names[:size]), weights=(1 / size,) * size,
                relative_cost=population.relative_cost(tuple(names[:size])),
            )
        )  # fmt: skip
        size *= 2
    population = population.model_copy(update={"tiers": tuple(tiers)})
    manifest.save(population, directory)
    return population


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in {"--members": 8, "--layers": 4, "--width": 256, "--vocab-size": 32_000}.items():
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--spread", type=float, default=1.0)
    arguments = parser.parse_args()
    made = make(
        arguments.out,
        num_members=arguments.members,
        layers=arguments.layers,
        width=arguments.width,
        vocab_size=arguments.vocab_size,
        spread=arguments.spread,
    )
    print(f"{arguments.out}: {len(made.members)} members of {made.members[0].num_parameters:,} parameters")

"""Saves snapshots as members, plain Hugging Face Llama checkpoints in bfloat16, loads them, and registers them in the manifest."""

import json
import shutil
from pathlib import Path

import torch
from pydantic import JsonValue
from safetensors.torch import load_file, save

from chorus.population import assemble, manifest
from chorus.population.errors import ChorusError
from chorus.population.files import sha256
from chorus.population.manifest import Member, Population, Provenance, read_config
from chorus.train.model import Llama
from chorus.train.run import Run
from chorus.train.shape import RMS_EPSILON, ROPE_THETA, Shape

WEIGHTS = "model.safetensors"


def save_member(model: Llama, run: Run, name: str) -> Path:
    """Write a checkpoint to `members/NAME`, under a temporary name first, so that `members/NAME` is always complete.

    A member of the same name, left by a killed run, is replaced unless its weights are equal.
    """
    final = run.directory / "members" / name
    temporary = final.with_name(f".{name}.saving")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors = {key: value.to("cpu", torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    (temporary / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))  # a full disk raises OSError here
    (temporary / "config.json").write_text(json.dumps(hugging_face_config(run), indent=2) + "\n", encoding="utf-8")
    if final.exists():
        if (final / WEIGHTS).is_file() and sha256(final / WEIGHTS) == sha256(temporary / WEIGHTS):
            shutil.rmtree(temporary)
            return final
        old = final.with_name(f".{name}.old")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
        return final
    return temporary.rename(final)


def load_member(run: Run, name: str, device: torch.device) -> Llama:
    """Load a member and check it against the manifest: in float32, frozen and in eval mode, to teach or to be averaged.

    Raises:
        ChorusError: it is not in the manifest, or its file is missing or damaged.
    """
    population = manifest.load(run.directory)
    manifest.verify_member(population.member(name), population, run.directory)
    return load_saved(run, name, device)


def load_saved(run: Run, name: str, device: torch.device) -> Llama:
    """As `load_member`, without the manifest: for members that are not registered yet, or that replace a registered one."""
    path = run.directory / "members" / name / WEIGHTS
    try:
        model = Llama(_shape(read_config(path.parent)))
        model.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except (ChorusError, OSError, RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ChorusError(
            f"the member {path.parent} cannot be read ({reason}). It is needed to continue. Restore it."
        ) from None
    return model.to(device).eval().requires_grad_(False)


def _shape(config: dict[str, JsonValue]) -> Shape:
    """The shape in a config from `hugging_face_config`: a student's may differ from its run's members."""
    keys = ("vocab_size", "max_position_embeddings", "num_hidden_layers", "hidden_size", "num_attention_heads")
    vocab_size, context_length, layers, width, heads = (int(str(config[key])) for key in keys)
    return Shape(vocab_size=vocab_size, context_length=context_length, layers=layers, width=width, heads=heads)


def hugging_face_config(run: Run) -> dict[str, object]:
    """The `config.json` of a member, as `transformers.LlamaConfig` reads it."""
    shape = run.shape
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.width,
        "intermediate_size": shape.feed_forward,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.heads,
        "head_dim": shape.head_size,
        "max_position_embeddings": shape.context_length,
        "hidden_act": "silu",
        "rms_norm_eps": RMS_EPSILON,
        "rope_theta": ROPE_THETA,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": run.prepared.bos,
        "eos_token_id": run.prepared.eos,
        "pad_token_id": None,
        "dtype": "bfloat16",
    }


def register(run: Run, member: Member) -> None:
    """Add a finished member to the manifest. The first member creates the manifest.

    Any process of the run may call this; a lock serialises them. Fitted tiers are kept, since their members are still there.
    Without a fit, the default tiers are set again for all members so far.
    """
    with manifest.updating(run.directory):
        known: tuple[Member, ...] = ()
        population = None
        if (run.directory / manifest.MANIFEST).exists():
            population = manifest.load(run.directory)
            known = tuple(m for m in population.members if m.name != member.name)
        members = tuple(sorted((*known, member), key=_sort_key))
        if population is None:
            assemble.write_shared_files(run.directory, run.directory / member.path, run.directory)
            population = _new_population(run, members)
        population = population.model_copy(update={"members": members})
        if population.prior_version == 0:
            population = population.with_uniform_tiers()
        manifest.save(population, run.directory)


def _sort_key(member: Member) -> tuple[bool, int, int, str]:
    """Sort key: snapshots in the order in which parallel trajectories finish them, then students and averages."""
    return member.cycle is None, member.cycle or 0, member.trajectory or 0, member.name


def _new_population(run: Run, members: tuple[Member, ...]) -> Population:
    return Population(
        name=assemble.as_name(run.directory.resolve().name),
        tokenizer_sha256=sha256(run.directory / "tokenizer.json"),
        vocab_size=run.shape.vocab_size,
        context_length=run.shape.context_length,
        members=members,
        provenance=Provenance(
            created_at=manifest.now(),
            chorus_version=assemble.chorus_version(),
            source=run.settings.corpus,
            settings={**run.settings.as_json(), "tokens": dict(run.prepared.tokens)},
        ),
    )

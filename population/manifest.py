"""The population directory's manifest: the one contract between training, prior and serving.

It knows what a population is made of (members, tiers, where they came from) and keeps `population.json` typed, versioned
and whole. It does not know how members are trained, weights are fitted or tokens are mixed.

    my-population/
      population.json      this manifest
      config.json          architecture PopulationForCausalLM, so that `vllm serve my-population` works by itself
      tokenizer.json ...   the one tokenizer that all members share
      members/t0-c03/      a plain Hugging Face checkpoint, safetensors only
      splits/              the held-out documents, as tokens (see `population.splits`)
      prior/               likelihoods, fit report, frontier plot
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from chorus.population.errors import ChorusError
from chorus.population.files import locked, read_json, sha256, write_text
from chorus.population.shell import command

MANIFEST = "population.json"
SCHEMA_VERSION = 1
SIMPLEX_TOLERANCE = 1e-6
LAST_PRIOR_VERSION = 2**31 - 1


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside the population's directory, like members/t0-c00")
    return path


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
InnerPath = Annotated[str, AfterValidator(_inside)]
"""Relative to the population's directory, and not out of it."""
FileName = Annotated[str, Field(pattern=r"^[^/\x00]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pool = Literal["linear", "log"]
Decoding = Literal["auto", "plain", "sampled", "speculative"]
"""How tokens are computed, by the same law: by all members at each token, by one that is drawn, by drafts that all verify, or
(`auto`) by the fastest of these."""
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


class _Record(BaseModel):
    """Frozen; unknown fields are refused, so that a manifest of a newer version is never half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Loss(_Record):
    """Mean negative log-likelihood per token, in nats, with a 95 % interval from a bootstrap over documents."""

    nats: float
    low: float
    high: float
    num_tokens: int = Field(ge=1)


class Member(_Record):
    """One model of the population: a Hugging Face checkpoint under the population's directory."""

    name: Name
    path: InnerPath
    """Directory of the checkpoint, relative to the population's."""
    sha256: dict[FileName, Sha256] = Field(min_length=1)
    """Digest of each weight file of the checkpoint, by file name."""
    num_parameters: int = Field(ge=1)
    trajectory: int | None = None
    cycle: int | None = None
    epochs: float | None = None
    """Epochs over the train split that the trajectory had seen at this snapshot."""
    teacher: Name | None = None
    """The member that taught this one, in chain distillation."""
    test_loss: Loss | None = None


class Tier(_Record):
    """What a request can ask for: which members answer, and with what weights.

    `linear` pools probabilities, p = sum_m w_m p_m; `log` pools logits, p ~ prod_m p_m^w_m. The temperature divides the
    pooled log-probabilities, which are then normalised again.
    """

    name: Name
    members: tuple[Name, ...] = Field(min_length=1)
    weights: tuple[float, ...]
    """In the order of `members`, on the simplex."""
    pool: Pool = "linear"
    temperature: float = Field(default=1.0, gt=0)
    decoding: Decoding = Field(default="auto", exclude_if=lambda decoding: decoding == "auto")
    """Of requests that leave it open, where it is exact for them; else they are decoded as by `auto`. Not written where it is
    `auto`, so that older versions read the manifest."""
    test_loss: Loss | None = None
    relative_cost: float = Field(gt=0)
    """Parameters of the tier's members over those of the population's largest member."""

    @property
    def budget(self) -> int:
        """Number of members that run for each token."""
        return len(self.members)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"tier {self.name!r} names a member twice: {list(self.members)}")
        if len(self.weights) != len(self.members):
            raise ValueError(f"tier {self.name!r} has {len(self.members)} members but {len(self.weights)} weights")
        if min(self.weights) < 0 or abs(math.fsum(self.weights) - 1) > SIMPLEX_TOLERANCE:
            raise ValueError(f"tier {self.name!r}: weights {list(self.weights)} are not on the simplex")
        return self


class Provenance(_Record):
    """Where the population came from: enough to make it again."""

    created_at: datetime
    chorus_version: str
    source: str
    """The corpus it was trained on, or the checkpoints it was made from."""
    settings: dict[str, JsonValue] = {}


class Population(_Record):
    """The manifest. Validated on every load and save."""

    schema_version: Literal[1] = 1
    name: Name
    tokenizer_sha256: Sha256
    vocab_size: int = Field(ge=1)
    context_length: int = Field(ge=2)
    """Longest sequence, in tokens, that every member was made for."""
    members: tuple[Member, ...] = Field(min_length=1)
    tiers: tuple[Tier, ...] = ()
    """From the cheapest to the dearest."""
    prior_version: int = Field(default=0, ge=0, le=LAST_PRIOR_VERSION)
    """Counts the fits: 0 while the tiers are uniform defaults."""
    provenance: Provenance

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"two members share a name: {names}")
        tier_names = [tier.name for tier in self.tiers]
        if len(set(tier_names)) != len(tier_names):
            raise ValueError(f"two tiers share a name: {tier_names}")
        for tier in self.tiers:
            if unknown := sorted(set(tier.members) - set(names)):
                raise ValueError(f"tier {tier.name!r} names members that do not exist: {unknown}; there are {names}")
        object.__setattr__(self, "tiers", tuple(self._running(tier) for tier in self.tiers))
        return self

    def _running(self, tier: Tier) -> Tier:
        """The tier without members of weight zero, at the cost of those that remain: no engine runs the others."""
        pairs = [pair for pair in zip(tier.members, tier.weights, strict=True) if pair[1] > 0]
        if len(pairs) == len(tier.members):
            return tier
        members, weights = zip(*pairs, strict=True)
        cost = self.relative_cost(members)
        return tier.model_copy(update={"members": members, "weights": weights, "relative_cost": cost})

    def member(self, name: str) -> Member:
        """The member of that name.

        Raises:
            ChorusError: there is none.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise ChorusError(f"no member {name!r}; there are {', '.join(m.name for m in self.members)}")

    def tier(self, name: str) -> Tier:
        """The tier of that name.

        Raises:
            ChorusError: there is none.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise ChorusError(f"no tier {name!r}; there are {', '.join(t.name for t in self.tiers) or 'none yet'}")

    def taking_prior_of(self, other: Self) -> Self | None:
        """This population under the tiers, version and losses of `other`; None if these were fitted to others.

        It is the same if all that a fit leaves alone is, as the members' names, paths and digests. Where it came from may differ.
        """
        losses = [member.test_loss for member in other.members]
        if len(losses) != len(self.members):
            return None
        members = tuple(m.model_copy(update={"test_loss": loss}) for m, loss in zip(self.members, losses, strict=True))
        update = {"members": members, "tiers": other.tiers, "prior_version": other.prior_version}
        taken = self.model_copy(update=update)
        return taken if taken == other.model_copy(update={"provenance": self.provenance}) else None

    def relative_cost(self, members: tuple[str, ...]) -> float:
        """Parameters of `members` over those of the population's largest member."""
        largest = max(member.num_parameters for member in self.members)
        return sum(self.member(name).num_parameters for name in members) / largest

    def with_uniform_tiers(self) -> Self:
        """The same members under default tiers: the last member alone, and all of them with equal weights.

        A population is servable from its first member on; `chorus prior fit` replaces these tiers by fitted ones.
        """
        names = tuple(member.name for member in self.members)
        sets = {"economy": names[-1:], "max": names} if len(names) > 1 else {"economy": names}
        tiers = tuple(
            Tier(name=name, members=m, weights=(1 / len(m),) * len(m), relative_cost=self.relative_cost(m))
            for name, m in sets.items()
        )
        return self.model_copy(update={"tiers": tiers, "prior_version": 0})


def load(directory: Path) -> Population:
    """Read and validate the manifest of a population directory. The weights are not read: see `verify`.

    Raises:
        ChorusError: there is no manifest, or it does not follow the schema.
    """
    path = directory / MANIFEST
    try:
        raw = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ChorusError(
            f"{directory} is not a population: it has no {MANIFEST}. "
            "Make one with `chorus train CORPUS --out DIR` or `chorus population init CHECKPOINT... --out DIR`."
        ) from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise ChorusError(
            f"{path} has schema version {version!r:.40}; this chorus reads version {SCHEMA_VERSION}. "
            "Use the chorus version that wrote it, or make the population again."
        )
    try:
        return Population.model_validate(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ChorusError(f"{path} does not follow the schema: {'; '.join(problems[:5])}{more}") from None


def save(population: Population, directory: Path) -> None:
    """Validate the manifest again and write it atomically."""
    checked = Population.model_validate(population.model_dump())
    write_text(directory / MANIFEST, checked.model_dump_json(indent=2) + "\n")


@contextmanager
def updating(directory: Path) -> Iterator[None]:
    """Hold the manifest: whoever loads it to save it again does both within, so that no change of another process is lost."""
    with locked(directory / f".{MANIFEST}.lock"):
        yield


def save_newer(population: Population, directory: Path) -> None:
    """Save a prior that came from elsewhere, unless the manifest there has a later one by now, or other members."""
    with updating(directory):
        there = load(directory)
        weights, expected = ({m.name: m.sha256 for m in each.members} for each in (there, population))
        if there.prior_version < population.prior_version and weights == expected:
            save(population, directory)


def verify(population: Population, directory: Path) -> None:
    """Check that the tokenizer and every member's weights are the files that the manifest was written for.

    Raises:
        ChorusError: a file is missing, differs from its digest, or is not safetensors; or a member's vocabulary differs.
    """
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise ChorusError(f"{tokenizer} is missing: the population's members share it. Restore it from a backup.")
    if (digest := sha256(tokenizer)) != population.tokenizer_sha256:
        raise ChorusError(
            f"{tokenizer} has sha256 {digest}, the manifest says {population.tokenizer_sha256}: "
            "members trained with another tokenizer would answer nonsense. Restore the file."
        )
    for member in population.members:
        verify_member(member, population, directory)


def verify_member(member: Member, population: Population, directory: Path) -> None:
    """Check one member's files against the manifest; see `verify`."""
    root = directory / member.path
    if not root.is_dir():
        raise ChorusError(
            f"member {member.name!r} is missing: {root} does not exist. Restore it, "
            f"or remove the member from {MANIFEST} and run `{command('chorus', 'prior', 'fit', directory)}`."
        )
    _check_inside(root, member, directory)
    for file in sorted(root.glob("*.safetensors")):
        if file.name not in member.sha256:
            raise ChorusError(
                f"member {member.name!r}: the manifest has no digest of {file}, so nothing vouches for these weights. "
                "Remove the file if it is not the member's."
            )
    for file_name, expected in member.sha256.items():
        file = root / file_name
        if not file_name.endswith(".safetensors"):
            raise ChorusError(f"member {member.name!r}: {file_name} is not safetensors, and no other format is read.")
        if not file.is_file():
            raise ChorusError(f"member {member.name!r}: {file} is missing. Restore it.")
        _check_inside(file, member, directory)
        if (digest := sha256(file)) != expected:
            raise ChorusError(
                f"member {member.name!r}: {file} has sha256 {digest}, the manifest says {expected}. "
                "The weights were changed or damaged: restore them."
            )
    vocab_size = read_config(root)["vocab_size"]
    if vocab_size != population.vocab_size:
        raise ChorusError(
            f"member {member.name!r} has a vocabulary of {vocab_size} tokens, the population one of "
            f"{population.vocab_size}: distributions over different vocabularies cannot be mixed."
        )


def _check_inside(path: Path, member: Member, directory: Path) -> None:
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ChorusError(
            f"member {member.name!r}: {path} is a link that leads out of the population, to {path.resolve()}. "
            "Put the files themselves there, or mount their disk there."
        )


def read_config(checkpoint: Path) -> dict[str, JsonValue]:
    """The `config.json` of a Hugging Face checkpoint.

    Raises:
        ChorusError: it is missing, is not JSON, or names no vocabulary size.
    """
    path = checkpoint / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ChorusError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json.") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ChorusError(f"{path} names no vocab_size: a decoder-only language model is expected.")
    return config


def now() -> datetime:
    """The present, in UTC and whole seconds, for `Provenance.created_at`."""
    return datetime.now(UTC).replace(microsecond=0)

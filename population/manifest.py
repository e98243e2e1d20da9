"""The manifest of a population directory: the contract between training, prior and serving.

It defines the schema of `population.json` (members, tiers, provenance), and loads, saves and verifies it. Training members,
fitting weights and mixing tokens happen elsewhere.

    my-population/
      population.json      this manifest
      config.json          architecture PopulationForCausalLM, so that `vllm serve my-population` works directly
      tokenizer.json ...   the tokenizer of all members
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
        raise ValueError(f"{path!r} is not a path inside the population's directory, such as members/t0-c00")
    return path


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}$")]
InnerPath = Annotated[str, AfterValidator(_inside)]
"""A path relative to the population's directory that stays inside it."""
FileName = Annotated[str, Field(pattern=r"^[^/\x00]+$")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Pool = Literal["linear", "log"]
Decoding = Literal["auto", "plain", "sampled", "speculative"]
"""How tokens are computed; all give the same distribution. `plain` runs all members at each token, `sampled` one drawn member,
`speculative` verifies drafts with all members, and `auto` picks the fastest of these."""
DECODINGS: tuple[Decoding, ...] = get_args(Decoding)


class _Record(BaseModel):
    """Frozen. Unknown fields are refused, so that a manifest of a newer version is never read in part."""

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
    """Directory of the checkpoint, relative to the population's directory."""
    sha256: dict[FileName, Sha256] = Field(min_length=1)
    """Digest of each weight file, by file name."""
    num_parameters: int = Field(ge=1)
    trajectory: int | None = None
    cycle: int | None = None
    epochs: float | None = None
    """Passes over the train split that the trajectory had made at this snapshot."""
    teacher: Name | None = None
    """The member that this one was distilled from."""
    test_loss: Loss | None = None


class Tier(_Record):
    """A named mixture: its members and their weights.

    `linear` pools probabilities, p = sum_m w_m p_m; `log` pools logits, p ~ prod_m p_m^w_m. The temperature divides the
    pooled log-probabilities, which are then renormalised.
    """

    name: Name
    members: tuple[Name, ...] = Field(min_length=1)
    weights: tuple[float, ...]
    """One per member, in the same order, on the simplex."""
    pool: Pool = "linear"
    temperature: float = Field(default=1.0, gt=0)
    decoding: Decoding = Field(default="auto", exclude_if=lambda decoding: decoding == "auto")
    """The decoding of requests that do not choose one, if it is exact for them; else `auto`. `auto` is not written to the file,
    so that older versions can read it."""
    test_loss: Loss | None = None
    relative_cost: float = Field(gt=0)
    """Parameters of the tier's members, divided by those of the population's largest member."""

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
    """Where the population came from, with enough detail to reproduce it."""

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
    """Maximum sequence length of all members, in tokens."""
    members: tuple[Member, ...] = Field(min_length=1)
    tiers: tuple[Tier, ...] = ()
    """In order of rising cost."""
    prior_version: int = Field(default=0, ge=0, le=LAST_PRIOR_VERSION)
    """The number of fits; 0 while the tiers are the uniform defaults."""
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
                raise ValueError(f"tier {tier.name!r} names unknown members {unknown}; the members are {names}")
        object.__setattr__(self, "tiers", tuple(self._without_zero_weights(tier) for tier in self.tiers))
        return self

    def _without_zero_weights(self, tier: Tier) -> Tier:
        """Drop members of weight zero, which engines do not run, and recompute the cost."""
        pairs = [pair for pair in zip(tier.members, tier.weights, strict=True) if pair[1] > 0]
        if len(pairs) == len(tier.members):
            return tier
        members, weights = zip(*pairs, strict=True)
        cost = self.relative_cost(members)
        return tier.model_copy(update={"members": members, "weights": weights, "relative_cost": cost})

    def member(self, name: str) -> Member:
        """The member called `name`.

        Raises:
            ChorusError: it does not exist.
        """
        for member in self.members:
            if member.name == name:
                return member
        raise ChorusError(f"no member {name!r}; the members are {', '.join(m.name for m in self.members)}")

    def tier(self, name: str) -> Tier:
        """The tier called `name`.

        Raises:
            ChorusError: it does not exist.
        """
        for tier in self.tiers:
            if tier.name == name:
                return tier
        raise ChorusError(f"no tier {name!r}; the tiers are {', '.join(t.name for t in self.tiers) or 'none yet'}")

    def taking_prior_of(self, other: Self) -> Self | None:
        """This population with the tiers, prior version and losses of `other`; None if `other` is a different population.

        All fields that a fit does not change must be equal, such as the members' names, paths and digests. Provenance may differ.
        """
        losses = [member.test_loss for member in other.members]
        if len(losses) != len(self.members):
            return None
        members = tuple(m.model_copy(update={"test_loss": loss}) for m, loss in zip(self.members, losses, strict=True))
        update = {"members": members, "tiers": other.tiers, "prior_version": other.prior_version}
        taken = self.model_copy(update=update)
        return taken if taken == other.model_copy(update={"provenance": self.provenance}) else None

    def relative_cost(self, members: tuple[str, ...]) -> float:
        """Parameters of `members`, divided by those of the population's largest member."""
        largest = max(member.num_parameters for member in self.members)
        return sum(self.member(name).num_parameters for name in members) / largest

    def with_uniform_tiers(self) -> Self:
        """This population with default tiers: the last member alone, and all members with equal weights.

        They make a population servable from its first member on. `chorus prior fit` replaces them with fitted tiers.
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
        ChorusError: there is no manifest, or it violates the schema.
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
            f"{path} has schema version {version!r:.40}; this version of chorus reads {SCHEMA_VERSION}. "
            "Use the chorus version that wrote it, or make the population again."
        )
    try:
        return Population.model_validate(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'manifest'}: {e['msg']}" for e in error.errors()]
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ChorusError(f"{path} violates the schema: {'; '.join(problems[:5])}{more}") from None


def save(population: Population, directory: Path) -> None:
    """Validate the manifest again and write it atomically."""
    checked = Population.model_validate(population.model_dump())
    write_text(directory / MANIFEST, checked.model_dump_json(indent=2) + "\n")


@contextmanager
def updating(directory: Path) -> Iterator[None]:
    """Lock the manifest. Every load-modify-save runs inside this block, so that no process loses another's change."""
    with locked(directory / f".{MANIFEST}.lock"):
        yield


def save_newer(population: Population, directory: Path) -> None:
    """Save a prior from elsewhere, unless the manifest on disk has the same or a later version, or other members."""
    with updating(directory):
        there = load(directory)
        weights, expected = ({m.name: m.sha256 for m in each.members} for each in (there, population))
        if there.prior_version < population.prior_version and weights == expected:
            save(population, directory)


def verify(population: Population, directory: Path) -> None:
    """Check the tokenizer and every member's weights against the digests in the manifest.

    Raises:
        ChorusError: a file is missing, differs from its digest, or is not safetensors; or a member's vocabulary differs.
    """
    tokenizer = directory / "tokenizer.json"
    if not tokenizer.is_file():
        raise ChorusError(f"{tokenizer} is missing: all members need it. Restore it from a backup.")
    if (digest := sha256(tokenizer)) != population.tokenizer_sha256:
        raise ChorusError(
            f"{tokenizer} has sha256 {digest}; the manifest expects {population.tokenizer_sha256}. "
            "With another tokenizer, the members' output is meaningless. Restore the file."
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
                f"member {member.name!r}: the manifest has no digest of {file}, so its weights cannot be verified. "
                "Remove the file if it does not belong to the member."
            )
    for file_name, expected in member.sha256.items():
        file = root / file_name
        if not file_name.endswith(".safetensors"):
            raise ChorusError(f"member {member.name!r}: {file_name} is not safetensors, the only format that is read.")
        if not file.is_file():
            raise ChorusError(f"member {member.name!r}: {file} is missing. Restore it.")
        _check_inside(file, member, directory)
        if (digest := sha256(file)) != expected:
            raise ChorusError(
                f"member {member.name!r}: {file} has sha256 {digest}; the manifest expects {expected}. "
                "The weights were changed or damaged: restore them."
            )
    vocab_size = read_config(root)["vocab_size"]
    if vocab_size != population.vocab_size:
        raise ChorusError(
            f"member {member.name!r} has a vocabulary of {vocab_size} tokens, but the population has "
            f"{population.vocab_size}: distributions over different vocabularies cannot be mixed."
        )


def _check_inside(path: Path, member: Member, directory: Path) -> None:
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ChorusError(
            f"member {member.name!r}: {path} links to {path.resolve()}, outside the population. "
            "Copy the files there, or mount their disk there."
        )


def read_config(checkpoint: Path) -> dict[str, JsonValue]:
    """The `config.json` of a Hugging Face checkpoint.

    Raises:
        ChorusError: it is missing, is not JSON, or has no vocabulary size.
    """
    path = checkpoint / "config.json"
    try:
        config = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ChorusError(f"{checkpoint} is not a Hugging Face checkpoint: it has no config.json.") from None
    if not isinstance(config, dict) or not isinstance(config.get("vocab_size"), int):
        raise ChorusError(f"{path} has no vocab_size: expected a decoder-only language model.")
    return config


def now() -> datetime:
    """The current time in UTC, in whole seconds, for `Provenance.created_at`."""
    return datetime.now(UTC).replace(microsecond=0)

"""API keys: which tenant may send requests, for which tiers, and how many. The key file may change at any time.

    {"keys": [{"name": "search", "sha256": "9f86...", "tiers": ["economy", "standard"], "floor": "economy",
               "requests_per_s": 5, "tokens_per_min": 20000, "share": 2}]}

It holds digests. A plain digest is enough for keys of high entropy, which cannot be guessed, however fast the digest is.
"""

import hashlib
import hmac
import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from chorus.population.errors import ChorusError
from chorus.population.manifest import Name
from chorus.serve.gateway.request.errors import ApiError

logger = logging.getLogger(__name__)

_MAX_KEY_CHARACTERS = 512


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """The holder of an API key. Without keys there is one tenant, with all rights."""

    name: str
    tiers: frozenset[str] | None = None
    """Tiers it may use; None for all."""
    floor: str | None = None
    """The smallest tier to which its requests may fall under load."""
    structured_outputs: bool = True
    """Whether it may request answers that follow a schema or a grammar, which an engine needs time to compile."""
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    share: float = 1.0
    """Its share of the engines under full load, relative to other tenants' shares."""


ANYONE = Tenant(name="anyone")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Key(_Record):
    """One key's tenant and rights."""

    name: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tiers: tuple[Name, ...] | None = Field(None, min_length=1)
    floor: Name | None = None
    structured_outputs: bool = True
    requests_per_s: float | None = Field(None, ge=1e-5, le=1e6)
    tokens_per_min: float | None = Field(None, ge=1, le=1e12)
    share: float = Field(1.0, ge=1e-3, le=1e3)

    def tenant(self) -> Tenant:
        """The tenant, without the digest."""
        return Tenant(
            name=self.name,
            tiers=None if self.tiers is None else frozenset(self.tiers),
            floor=self.floor,
            structured_outputs=self.structured_outputs,
            requests_per_s=self.requests_per_s,
            tokens_per_min=self.tokens_per_min,
            share=self.share,
        )


class KeyFile(_Record):
    """The content of a key file."""

    keys: tuple[Key, ...]

    @model_validator(mode="after")
    def _check(self) -> "KeyFile":
        for what in ("name", "sha256"):
            values = [getattr(key, what) for key in self.keys]
            if len(set(values)) != len(values):
                raise ValueError(f"two keys have the same {what}")
        return self


class Keys:
    """The keys currently in force. Several keys of one holder need different names."""

    def __init__(self, *, path: Path | None = None, text: str | None = None) -> None:
        """Read the keys from a file, again whenever it changes, or from `text`; without either, all requests have all rights.

        Raises:
            ChorusError: the keys cannot be read. The message contains none of them.
        """
        self._path = path
        self._stamp = self._file_stamp()
        self._keys: list[tuple[bytes, Tenant]] | None = None
        if path is not None:
            self._keys = _read(_load(path), str(path))
        elif text is not None:
            self._keys = _read(text, "CHORUS_API_KEYS")

    @property
    def are_needed(self) -> bool:
        """Whether a request without a key is refused."""
        return self._keys is not None

    def tenant(self, authorization: str | None) -> Tenant:
        """The tenant of an `Authorization` header.

        Raises:
            ApiError: 401 if the key is missing or unknown.
        """
        self._reload_if_changed()
        if self._keys is None:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized(
                "the API key is missing; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                code="missing_api_key",
            )
        digest = hashlib.sha256(key.strip()[:_MAX_KEY_CHARACTERS].encode(errors="replace")).hexdigest().encode()
        found = None
        for known, tenant in self._keys:  # compare with all, so that the time taken reveals nothing
            if hmac.compare_digest(known, digest):
                found = tenant
        if found is None:
            raise _unauthorized(
                "this API key is unknown; check it, or ask the operator for a new one.", code="invalid_api_key"
            )
        return found

    def _reload_if_changed(self) -> None:
        if self._path is None or (stamp := self._file_stamp()) == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = _read(_load(self._path), str(self._path))
            logger.info("loaded %d API keys", len(self._keys))
        except ChorusError as error:
            logger.error("cannot use the changed API keys; keeping the previous ones: %s", error)

    def _file_stamp(self) -> tuple[int, int, int]:
        if self._path is None:
            return (0, 0, 0)
        try:
            status = self._path.stat()  # follows links: a mounted secret is replaced by redirecting a link
        except OSError:
            return (0, 0, 0)
        return (status.st_ino, status.st_size, status.st_mtime_ns)


def _load(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows editors and shells write a byte order mark
    except UnicodeDecodeError:
        raise ChorusError(f"cannot read the API keys in {path}: the file is not UTF-8. Save it as UTF-8.") from None
    except OSError as error:
        raise ChorusError(
            f"cannot read the API keys in {path}: {type(error).__name__}. Check the path and its permissions."
        ) from None


def _read(text: str, source: str) -> list[tuple[bytes, Tenant]]:
    try:
        found = KeyFile.model_validate_json(text)
    except ValidationError as error:
        # Without the input, which may hold secrets.
        problems = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'file'}: {each['msg']}" for each in error.errors())
        raise ChorusError(
            f"the API keys in {source} are invalid: {problems}. See docs/gateway.md for the format."
        ) from None
    return [(key.sha256.encode(), key.tenant()) for key in found.keys]


def _unauthorized(message: str, *, code: str) -> ApiError:
    return ApiError(401, message, code=code, headers={"WWW-Authenticate": "Bearer"})

"""The `population` object of an answer: its members, the work they did, and whether its time budget was met."""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from chorus.population.manifest import Tier
from chorus.serve.gateway.request.call import TimeBudget
from chorus.serve.gateway.request.offer import Offer

_KEY = re.compile(rb'"kv_transfer_params"\s*:\s*')
_STOP_REASON = re.compile(rb'"stop_reason"\s*:\s*(?=")')
_FIELDS = ("decoding", "members_per_token", "drops")


def new_report_prefix() -> str:
    """A random prefix for a report sent in place of a stop reason: a client's stop text cannot imitate it."""
    return f"chorus:{secrets.token_hex(8)}:"


@dataclass(kw_only=True)
class Report:
    """One answer's report, completed while the answer is generated."""

    offer: Offer
    tier: Tier
    """The tier with which the answer began."""
    tiers: Sequence[Tier] = ()
    """Tiers that the answer may amount to, largest first."""
    max_members: int | None
    """How many of the tier's members it began with; None for all."""
    requested: str
    time_budget: TimeBudget
    prefix: str | None = None
    """Prefix of a stop reason that is the engine's report; empty for a whole answer, None if no report was requested."""
    computed: dict[str, Any] = field(default_factory=dict)
    """What the engine reports, if it does: decoding, members per token, and drops."""
    is_truncated: bool = False
    num_drops: int = 0
    """Members dropped, over all choices, if the engine reports it."""
    _num_tokens: int = 0
    _num_member_tokens: int = 0
    """Over all choices: tokens whose members are known, and the sum of their numbers of members."""

    @property
    def served(self) -> Tier:
        """The tier that the answer amounts to: the smallest with at least as many members as its tokens had on average."""
        if not self._num_tokens:
            return self.tier
        members = round(self._num_member_tokens / self._num_tokens)
        fitting = [tier for tier in self.tiers if members <= tier.budget <= self.tier.budget]
        return min(fitting, key=lambda tier: tier.budget, default=self.tier)

    def begin(self) -> bytes:
        """The object as known when the answer begins."""
        return self._object(self._requested_fields())

    def end(self, elapsed_s: float) -> bytes:
        """The object when the answer is complete, `elapsed_s` after the request arrived."""
        extra = self._requested_fields()
        if self.time_budget.budget_s is not None:
            is_met = elapsed_s <= self.time_budget.budget_s
            extra |= {"elapsed_ms": round(1000 * elapsed_s, 1), "deadline": "met" if is_met else "missed"}
            extra |= {"truncated": self.is_truncated}
        return self._object(extra | self.computed)

    def _object(self, extra: dict[str, Any]) -> bytes:
        known = self.offer.population_json[self.served.name]
        return known[:-1] + b"," + _dumps(extra)[1:] if extra else known

    def extract(self, body: bytes) -> bytes:
        """Take the engine's report out of a whole answer, from the vLLM field that carries it (`kv_transfer_params`)."""
        matches = list(_KEY.finditer(body))
        if not matches or not body.startswith(b"{", start := matches[-1].end()):
            return body
        found, rest = _read(body[start:])
        self._note(found)
        return body[:start] + b"null" + rest

    def extract_from_event(self, event: bytes) -> bytes:
        """The same for the event that ends a choice: its stop reason is the report, which contains the real one."""
        self.computed = {}  # discard the report of the previous choice
        if not self.prefix or not (match := _STOP_REASON.search(event)):
            return event
        text, rest = _read(event[match.end() :])
        if not text.startswith(self.prefix):
            return event
        found = json.loads(text.removeprefix(self.prefix))
        self._note(found)
        return event[: match.end()] + json.dumps(found["stop_reason"]).encode() + rest

    def _note(self, found: dict[str, Any]) -> None:
        self.computed = {key: found[key] for key in _FIELDS if key in found}
        num_absent_at_start = 0 if self.max_members is None else len(self.tier.members) - self.max_members
        for members, tokens in self.computed.get("members_per_token", ()):
            self._num_tokens += tokens
            self._num_member_tokens += members * tokens
        self.num_drops += max(0, len(self.computed.get("drops", ())) - num_absent_at_start)

    def _requested_fields(self) -> dict[str, Any]:
        extra: dict[str, Any] = {}
        if self.time_budget.budget_s is not None or (
            self.requested != "default" and self.requested != self.served.name
        ):
            extra["tier_asked"] = self.requested
        if self.time_budget.budget_s is not None:
            if self.max_members is not None:
                extra["most_members"] = self.max_members
            extra["latency_budget_ms"] = round(1000 * self.time_budget.budget_s, 3)
        return extra


def _read(data: bytes) -> tuple[Any, bytes]:
    """The JSON value at the start of `data`, and the rest."""
    text = data.decode()
    found, length = json.JSONDecoder().raw_decode(text)
    return found, text[length:].encode()


def _dumps(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

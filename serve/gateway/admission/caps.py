"""The member cap of every engine, from the demand on all of them, the backlog and the tiers' losses."""

import time
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from chorus.serve.gateway.admission.demand import Demand
from chorus.serve.gateway.admission.member_cap import MemberCap, Supply
from chorus.serve.gateway.admission.placement import Job, alone_s
from chorus.serve.gateway.admission.queue import FairQueue
from chorus.serve.gateway.engines.engine import Engine

_INTERVAL_S = 0.02
"""A cap is computed anew after this time at the earliest."""


@dataclass(kw_only=True)
class _EngineCap:
    rule: MemberCap = field(default_factory=MemberCap)
    members: int = 0
    updated_at: float = float("-inf")


class MemberCaps:
    """Demand as it comes, and each engine's cap from it."""

    def __init__(self, *, max_sequences: int, probability: float, queue_timeout_s: float) -> None:
        """See `admission.Limits`."""
        self._max_sequences, self._probability = max_sequences, probability
        self._queue_timeout_s = queue_timeout_s
        self._demand = Demand()
        self._caps: WeakKeyDictionary[Engine, _EngineCap] = WeakKeyDictionary()
        self._max_members = 1
        self._losses: dict[int, float] = {}
        """Of the tiers that were requested, by their number of members."""

    def note_request(self, job: Job, engine: Engine) -> None:
        """A request came. `engine` is one that may serve it."""
        now, size, tiers, model = time.perf_counter(), job.size, job.tiers, engine.model
        prompt_tokens = model.prompt_tokens(tokens=size.prompt_tokens, characters=size.prompt_characters)
        self._max_members = max(self._max_members, len(tiers[0].members))
        self._losses |= {tier.budget: tier.test_loss.nats for tier in tiers if tier.test_loss is not None}
        if not job.is_flexible or job.finish_by is None:
            members = len(tiers[-1 if job.is_unattainable else 0].members)
            self._demand.note_fixed(size, prompt_tokens=prompt_tokens, members=members, now=now)
            return
        # No request waits longer than this, however long its budget.
        longest_s = alone_s(tiers[0], job, model) + self._queue_timeout_s
        budget_s = min(longest_s, max(0.0, job.finish_by - now))
        self._demand.note_flexible(size, prompt_tokens=prompt_tokens, budget_s=budget_s, now=now)

    def of(self, engine: Engine, num_engines: int, queue: FairQueue, now: float) -> int:
        """The cap of an engine, one of `num_engines` that share the demand; all members until its times are known."""
        if not engine.model.is_seeded:
            return self._max_members
        cap = self._caps.setdefault(engine, _EngineCap())
        if now - cap.updated_at >= _INTERVAL_S:
            supply = Supply(
                model=engine.model,
                costs=engine.costs,
                num_engines=num_engines,
                max_sequences=self._max_sequences,
                probability=self._probability,
            )
            cap.updated_at = now
            cap.members = cap.rule.update(
                self._demand.rates(now),
                supply,
                max_members=self._max_members,
                backlog=queue.backlog,
                losses=self._losses,
            )
        return cap.members

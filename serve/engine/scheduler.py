"""vLLM's scheduler, extended by each request's mixture, which it sends to the workers with its output.

Resolves tiers when requests arrive, chooses how requests are decoded, and before each step drops members from requests that would
miss their deadline.
"""

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.scheduler import Scheduler

from chorus.population import manifest
from chorus.population.errors import ChorusError
from chorus.population.manifest import Decoding
from chorus.population.wire import (
    BUDGET_ARGUMENT,
    DECODING_ARGUMENT,
    EXPECTED_TOKENS_ARGUMENT,
    FLOOR_ARGUMENT,
    MAX_MEMBERS_ARGUMENT,
    REPORT_ARGUMENT,
    TIER_ARGUMENT,
)
from chorus.serve.engine.chooser import Candidate, DecodingChooser, Kind
from chorus.serve.engine.deadline import Deadline, Scheduled, StepCost, StepLoad, StepTally, keep_deadlines, way_down
from chorus.serve.engine.decoding import (
    MAX_DRAFTS,
    Acceptance,
    MemberDraws,
    Work,
    decoding_of,
    why_not_sampled,
    why_not_speculative,
)
from chorus.serve.engine.grammars import GrammarManager
from chorus.serve.engine.kv import MemberCoordinator, groups_by_member
from chorus.serve.engine.metrics import DROP_REASONS, StepCounts, attach
from chorus.serve.engine.mixture import Mixture, Prior

logger = init_logger(__name__)

_OBSERVE_INTERVAL = 4
"""Steps between observations of the step cost, which changes slowly; an observation takes some hundred microseconds."""
_IDLE_OBSERVE_INTERVAL = 32
"""The same while no request needs the step cost, so that it is already learned for the first that does."""
_CHOOSE_INTERVAL = 4
"""Steps between choices of the decoding."""
_DEFAULT_DRAFTS = 3
"""Drafts per step of requests with `speculative` decoding, when the chooser would not draft."""


@dataclass(kw_only=True, slots=True)
class _Sampling:
    """State of a request whose members may be sampled, one per token."""

    draws: MemberDraws
    is_forced: bool
    """Whether every token is sampled, even if that is slower."""
    sent: Mixture | None = None
    """The mixture last sent to the workers."""


@dataclass(kw_only=True, slots=True)
class _Speculation:
    """State of a request whose heaviest member may draft."""

    is_forced: bool
    """Whether it drafts even if that is slower."""
    acceptance: Acceptance = field(default_factory=Acceptance)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """What runs for a request in its next step, if it is scheduled."""

    mixture: Mixture
    missed: dict[int, int]
    """Tokens to catch up with, by member."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _StepRecord:
    """A finished step."""

    load: StepLoad
    num_requests: int
    members_s: float
    """Seconds spent in members and mixing."""
    kind: Kind
    reads_prompts: bool


class PopulationScheduler(Scheduler):
    """Sends each request's mixture to the workers when it is first scheduled, and again when it changes."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        directory = Path(vllm_config.model_config.model)
        self._member_names = [member.name for member in manifest.load(directory).members]
        groups_of = groups_by_member(kv_cache_config, len(self._member_names))
        self._prior = Prior(directory)
        self._mixtures: dict[str, Mixture] = {}
        self._deadlines: dict[str, Deadline] = {}
        self._changed: set[str] = set()
        self._sampling: dict[str, _Sampling] = {}
        self._planned: dict[str, _Planned] = {}
        """What runs in the current step for requests in `_sampling`. Other requests run all their members."""
        self._speculating: dict[str, _Speculation] = {}
        self._work: dict[str, Work] = {}
        """Work of requests that get a report."""
        self._draft_blockers: set[str] = set()
        """Requests with `logprob_token_ids`, on which vLLM's rejection sampler fails: while one runs, no request gets drafts."""
        if self.num_spec_tokens:
            self.num_lookahead_tokens = (
                MAX_DRAFTS  # a drafter writes KV of its drafts before the step that verifies them
            )
            # The number of drafts varies by request, so vLLM must not pad with empty drafts.
            self.dynamic_sd_lookup: Any = defaultdict(lambda: MAX_DRAFTS)
        GrammarManager.adopt(self.structured_output_manager)
        self._kv = MemberCoordinator.adopt(self.kv_cache_manager, groups_of)
        self._step_cost = StepCost()
        self._chooser = DecodingChooser(self._step_cost)
        self._chosen_batch_size = 0
        """Number of running requests at the last choice."""
        self._step_started = 0.0
        self._num_steps = 0
        self._last_step: _StepRecord | None = None
        """The previous step, if it is to be learned from."""
        self.counts = StepCounts(len(self._member_names))

    def add_request(self, request: Any) -> None:
        """Resolve the request's mixture, deadline and decoding, then queue it."""
        if request.request_id not in self._mixtures:
            arguments = (request.sampling_params and request.sampling_params.extra_args) or {}
            mixture = self._resolve(request.request_id, arguments)
            if BUDGET_ARGUMENT in arguments:
                mixture = self._begin_deadline(request, mixture, arguments)
            self._mixtures[request.request_id] = mixture
            if BUDGET_ARGUMENT in arguments or REPORT_ARGUMENT in arguments:
                self._work[request.request_id] = Work()
            if request.sampling_params is not None:
                decoding = decoding_of(arguments.get(DECODING_ARGUMENT), request.sampling_params, mixture)
                self._begin_sampling(request, mixture, decoding)
                self._begin_speculation(request, mixture, decoding)
            self._kv.assign(request.request_id, mixture.members)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's plan for the next step, plus new or changed mixtures, tokens to catch up with, and drafts to make."""
        now = time.monotonic()
        if self._last_step is not None:
            last_step, seconds = self._last_step, now - self._step_started
            if not last_step.reads_prompts:
                self._chooser.observe_step(last_step.kind, last_step.load, seconds, num_requests=last_step.num_requests)
            if last_step.kind != "drafts" or not self._step_cost.is_known:
                self._step_cost.observe(last_step.load, seconds, members_s=last_step.members_s)
            self._last_step = None
        self._step_started = now
        is_choice_due = self._num_steps % _CHOOSE_INTERVAL == 0 or len(self.running) != self._chosen_batch_size
        if is_choice_due and self.running and (self._sampling or self._speculating):
            self._choose_decoding()
        if self._deadlines:
            self._keep_deadlines()
        if self._draft_blockers:
            for request in self.running:
                request.spec_token_ids = []
        self._planned = self._plan_sampling() if self._sampling else {}
        output = super().schedule(*args, **kwargs)
        self._changed.update(request.req_id for request in output.scheduled_new_reqs)
        output.mixtures = {request_id: self._mixtures[request_id] for request_id in self._changed}
        output.missed = {}
        self._changed.clear()
        if self._sampling:
            self._commit_sampling(output)
        for request in self.running:
            if request.spec_token_ids and request.request_id not in output.num_scheduled_tokens:
                request.spec_token_ids = []  # the probabilities that they were drawn from are kept for only one step
        output.drafts = self._plan_drafts(output) if self._speculating and not self._draft_blockers else {}
        return output

    def _begin_sampling(self, request: Any, mixture: Mixture, decoding: Decoding) -> None:
        """Track the request in `_sampling` if its members may be sampled."""
        parameters = request.sampling_params
        if decoding not in ("auto", "sampled") or len(mixture.members) == 1:
            return
        if why_not_sampled(parameters, mixture) is not None:
            return
        # A seed must give the same tokens at any load, so such a request always samples.
        is_forced = decoding == "sampled" or parameters.seed is not None
        self._sampling[request.request_id] = _Sampling(draws=MemberDraws(parameters.seed), is_forced=is_forced)

    def _begin_speculation(self, request: Any, mixture: Mixture, decoding: Decoding) -> None:
        """Track the request in `_speculating` if members may draft for it, or in `_draft_blockers`."""
        if getattr(request.sampling_params, "logprob_token_ids", None):
            self._draft_blockers.add(request.request_id)
            return
        if not self.num_spec_tokens or decoding not in ("auto", "speculative") or len(mixture.members) == 1:
            return
        if why_not_speculative(request.sampling_params) is not None:
            return
        self._speculating[request.request_id] = _Speculation(is_forced=decoding == "speculative")

    def _plan_drafts(self, output: Any) -> dict[str, int]:
        """Drafts to make at the end of this step, for each request that may draft and runs all its members in it."""
        drafts = {}
        for request_id in output.num_scheduled_tokens:
            own, planned = self._speculating.get(request_id), self._planned.get(request_id)
            if own is None or (planned is not None and planned.mixture is not self._mixtures[request_id]):
                continue
            if own.is_forced or not (self._chooser.current.samples and request_id in self._sampling):
                drafts[request_id] = self._chooser.current.drafts or (_DEFAULT_DRAFTS if own.is_forced else 0)
        return {request_id: count for request_id, count in drafts.items() if count}

    def _choose_decoding(self) -> None:
        candidates = []
        for request in self.running:
            sampling, own = self._sampling.get(request.request_id), self._speculating.get(request.request_id)
            candidates.append(
                Candidate(
                    mixture=self._mixtures[request.request_id],
                    context=request.num_computed_tokens,
                    can_be_sampled=sampling is not None,
                    is_sampled=sampling is not None and sampling.is_forced,
                    acceptance=None if own is None else own.acceptance,
                )
            )
        self._chooser.choose(candidates)
        self._chosen_batch_size = len(candidates)

    def _plan_sampling(self) -> dict[str, _Planned]:
        """Choose the members that run next, for requests past their prompt that sample members or must catch up."""
        ready = [
            (request, self._sampling[request.request_id])
            for request in self.running
            if request.request_id in self._sampling
            and request.num_tokens - request.num_computed_tokens == 1
            and not request.spec_token_ids
        ]
        if not ready:
            return {}
        planned = {}
        for request, own in ready:
            mixture = self._mixtures[request.request_id]
            if own.is_forced or self._chooser.current.samples:
                mixture = own.draws.draw(mixture, request.num_output_tokens)
            elif not self._kv.is_behind(request.request_id):
                continue
            missed = self._kv.plan(request.request_id, mixture.members, request.num_computed_tokens)
            planned[request.request_id] = _Planned(mixture=mixture, missed=missed)
        return planned

    def _commit_sampling(self, output: Any) -> None:
        """Send the plans of the scheduled requests to the workers, and discard the others."""
        for request_id, own in self._sampling.items():
            if request_id not in output.num_scheduled_tokens:
                self._planned.pop(request_id, None)
                continue
            mixture = self._mixtures[request_id]
            if (planned := self._planned.get(request_id)) is not None:
                mixture = planned.mixture
                self._kv.advance(request_id)
                if planned.missed:
                    output.missed[request_id] = planned.missed
            if mixture is not own.sent:
                output.mixtures[request_id] = own.sent = mixture
            else:
                output.mixtures.pop(request_id, None)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Record what the step did, then let vLLM process its tokens."""
        self._num_steps += 1
        is_learning = self._deadlines or self._sampling or self._speculating or not self._step_cost.is_known
        interval = _OBSERVE_INTERVAL if is_learning else _IDLE_OBSERVE_INTERVAL
        record = None
        if scheduler_output.num_scheduled_tokens and self._num_steps % interval == 0:
            record = self._observe(scheduler_output, model_runner_output)
        if self.log_stats and scheduler_output.num_scheduled_tokens:
            self.counts.count_step(
                self._rows_by_set(scheduler_output.num_scheduled_tokens),
                model_runner_output.seconds,
                draft_passes=model_runner_output.draft_passes,
                caught_up=sum(sum(planned.missed.values()) for planned in self._planned.values()),
            )
        for request_id, drafts in scheduler_output.scheduled_spec_decode_tokens.items():
            if (own := self._speculating.get(request_id)) is not None:
                sampled = model_runner_output.sampled_token_ids[model_runner_output.req_id_to_index[request_id]]
                own.acceptance.observe(len(drafts), max(0, len(sampled) - 1))
                self._chooser.acceptance.observe(len(drafts), max(0, len(sampled) - 1))
        if scheduler_output.drafts:
            drafted, requested = model_runner_output.drafted, scheduler_output.drafts
            self._chooser.observe_drafters(sum(drafted.values()), sum(requested.values()))
        if self._work:
            self._count_work(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self.running:  # else the next step does not follow at once, and the time until it does not measure this one
            self._last_step = record
        return outputs

    def _count_work(self, scheduler_output: Any, model_runner_output: Any) -> None:
        """Add a step to the work of the requests that got tokens from it."""
        verified = scheduler_output.scheduled_spec_decode_tokens
        for request_id, row in model_runner_output.req_id_to_index.items():
            work = self._work.get(request_id)
            if work is None or not (tokens := len(model_runner_output.sampled_token_ids[row])):
                continue
            planned = self._planned.get(request_id)
            mixture = self._mixtures[request_id] if planned is None else planned.mixture
            work.tokens += tokens
            work.passes += len(mixture.members) + model_runner_output.drafted.get(request_id, 0)
            work.drafts += len(verified.get(request_id, ()))
            work.accepted += tokens - 1
            work.caught_up_rows += sum(planned.missed.values()) if planned else 0

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics, with our totals attached when due."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.counts.is_due(is_idle=not self.running):
            active_sets = len({self._mixtures[request.request_id].members for request in self.running})
            attach(
                self.counts.totals(
                    active_sets=active_sets, prior_version=self._prior.version, step_costs=self._step_cost.parts()
                ),
                stats,
            )
        return stats

    def _rows_by_set(self, num_scheduled_tokens: dict[str, int]) -> dict[tuple[int, ...], int]:
        rows: dict[tuple[int, ...], int] = {}
        for request_id, num_tokens in num_scheduled_tokens.items():
            if request_id in self._mixtures:
                planned = self._planned.get(request_id)
                mixture = self._mixtures[request_id] if planned is None else planned.mixture
                rows[mixture.members] = rows.get(mixture.members, 0) + num_tokens
                for member, missed in (planned.missed if planned else {}).items():
                    rows[member,] = rows.get((member,), 0) + missed
        return rows

    def _begin_deadline(self, request: Any, mixture: Mixture, arguments: Mapping[str, Any]) -> Mixture:
        """Track a request's deadline. Returns the mixture that it begins with, after drops at the start."""
        name = arguments.get(FLOOR_ARGUMENT, self._prior.tiers[0])
        floor = self._resolve(request.request_id, {TIER_ARGUMENT: name})
        fitted = tuple(self._prior.mixture(tier) for tier in self._prior.tiers)
        deadline = Deadline(
            finish_at=request.arrival_time + arguments[BUDGET_ARGUMENT] / 1000,
            way_down=way_down(mixture, frozenset(floor.members), fitted),
            expected_tokens=arguments.get(EXPECTED_TOKENS_ARGUMENT),
        )
        self._deadlines[request.request_id] = deadline
        max_members = arguments.get(MAX_MEMBERS_ARGUMENT, len(mixture.members))
        while len(mixture.members) > max_members and deadline.may_leave:
            self.counts.count_drop("start")
            _, mixture = deadline.drop(at_token=0, reason=DROP_REASONS["start"])
        return mixture

    def _keep_deadlines(self) -> None:
        """Drop members so that requests meet their deadlines, including waiting requests that may start in this step."""
        now, gain = time.time(), 1.0
        if self._speculating and not self._chooser.current.samples:
            gain = self._chooser.current.gain
        requests = list(
            chain(self.running, islice(self.waiting, max(0, self.max_num_running_reqs - len(self.running))))
        )
        scheduled = [self._scheduled(request) for request in requests]
        drops = keep_deadlines(scheduled, now, lambda load: (self._step_cost.predict(load) or 0.0) / gain)
        for request, count in zip(requests, drops, strict=True):
            for _ in range(count):
                is_late = self._deadlines[request.request_id].finish_at < now
                self._drop_member(request, "late" if is_late else "forecast")

    def _scheduled(self, request: Any) -> Scheduled:
        members = self._mixtures[request.request_id].members
        sampling = self._sampling.get(request.request_id)
        is_sampled = sampling is not None and (sampling.is_forced or self._chooser.current.samples)
        if is_sampled and (planned := self._planned.get(request.request_id)) is not None:
            members = planned.mixture.members  # the last step's draw stands in for the next one's
        return Scheduled(
            members=members,
            context=request.num_computed_tokens,
            deadline=None if is_sampled else self._deadlines.get(request.request_id),
            num_tokens=request.num_output_tokens,
            max_tokens=request.max_tokens,
        )

    def _drop_member(self, request: Any, reason: str) -> None:
        deadline = self._deadlines[request.request_id]
        self.counts.count_drop(reason)
        member, mixture = deadline.drop(at_token=request.num_output_tokens, reason=DROP_REASONS[reason])
        self._mixtures[request.request_id] = mixture
        self._kv.drop(request.request_id, member)
        self._changed.add(request.request_id)

    def _observe(self, output: Any, model_runner_output: Any) -> _StepRecord:
        """The record of a finished step."""
        tally, is_sampled = StepTally(), False
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            if request_id in self.requests:
                planned, context = self._planned.get(request_id), self.requests[request_id].num_computed_tokens
                if planned is None:
                    tally.add(self._mixtures[request_id].members, rows=num_tokens, context=context, drafts=drafts)
                else:
                    caught_up = sum(planned.missed.values())
                    tally.add(planned.mixture.members, rows=num_tokens, context=context, caught_up=caught_up)
                    is_sampled = is_sampled or planned.mixture is not self._mixtures[request_id]
        drafted = model_runner_output.drafted.values()
        tally.draft(sum(model_runner_output.draft_passes.values()), rows=sum(drafted))
        num_drafts = sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return _StepRecord(
            load=tally.load(),
            num_requests=len(output.num_scheduled_tokens),
            members_s=sum(model_runner_output.seconds),
            kind="drafts" if num_drafts or output.drafts else "sampled" if is_sampled else "plain",
            reads_prompts=output.total_num_scheduled_tokens > len(output.num_scheduled_tokens) + num_drafts,
        )

    def _get_local_prefix_cache_hit(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self._kv.searched_request_id = request.request_id
        return super()._get_local_prefix_cache_hit(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Free the request, and return its report in place of `kv_transfer_params`, which vLLM copies into the response.

        That field is unused because KV transfer is refused at start. vLLM's streams omit it, so a request can get the report in its
        stop reason as well (`REPORT_ARGUMENT`).
        """
        report = self._report(request)
        if report is not None and (prefix := (request.sampling_params.extra_args or {}).get(REPORT_ARGUMENT)):
            request.stop_reason = prefix + json.dumps({**report, "stop_reason": request.stop_reason})
        kv_transfer_params, ec_transfer_params = super()._free_request(request, *args, **kwargs)
        return report or kv_transfer_params, ec_transfer_params

    def _free_blocks(self, request: Any) -> None:
        super()._free_blocks(request)
        del self._mixtures[request.request_id]
        self._kv.remove(request.request_id)
        self._deadlines.pop(request.request_id, None)
        self._sampling.pop(request.request_id, None)
        self._speculating.pop(request.request_id, None)
        self._work.pop(request.request_id, None)
        self._draft_blockers.discard(request.request_id)
        self._planned.pop(request.request_id, None)
        self._changed.discard(request.request_id)

    def _report(self, request: Any) -> dict[str, Any] | None:
        """The request's report, or None if it gets none. With a time budget, includes the members per token and all drops."""
        work, deadline = self._work.get(request.request_id), self._deadlines.get(request.request_id)
        if work is None:
            return None
        if deadline is None:
            return {"decoding": work.report()}
        num_members = len(self._mixtures[request.request_id].members) + len(deadline.drops)
        boundaries = [0, *(drop.at_token for drop in deadline.drops), request.num_output_tokens]
        counts = [(num_members - idx, stop - start) for idx, (start, stop) in enumerate(pairwise(boundaries))]
        return {
            "decoding": work.report(),
            "members_per_token": [[members, tokens] for members, tokens in counts if tokens],
            "drops": [
                {"member": self._member_names[drop.member], "at_token": drop.at_token, "reason": drop.reason}
                for drop in deadline.drops
            ],
        }

    def _resolve(self, request_id: str, arguments: Mapping[str, object]) -> Mixture:
        try:
            return self._prior.resolve(arguments)
        except ChorusError as error:
            # The API server has already refused unknown tiers; an exception here would stop the engine for all requests.
            logger.error("request %s: %s; using the most expensive tier", request_id, error)
            return self._prior.mixture(None)

"""One try of a request on one engine: send the call, pass a stream on as it comes, count what the engine computed."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import aiohttp

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission.queue import Grant
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.relay.context import RequestContext
from chorus.serve.gateway.relay.forms import FORMS
from chorus.serve.gateway.relay.offsets import Offsets
from chorus.serve.gateway.relay.reply import EVENT_STREAM, Reply
from chorus.serve.gateway.relay.report import Report, new_report_prefix
from chorus.serve.gateway.relay.splice import FINISHED, Additions
from chorus.serve.gateway.relay.wait import Wait
from chorus.serve.gateway.request.call import Call, Kind
from chorus.serve.gateway.request.errors import ApiError, bad_request, engine_error, explain_length
from chorus.serve.gateway.request.size import NO_USAGE, Usage

_WITH_STOP_REASON: tuple[Kind, ...] = ("completion", "chat")
"""APIs whose streams carry the engine's stop reason unchanged, and with it the engine's report."""


class Attempt:
    """One try. `run` it inside its `wait`, then `settle` it."""

    def __init__(
        self, context: RequestContext, grant: Grant, reply: Reply, *, path: str, call: Call, tiers: Sequence[Tier]
    ) -> None:
        self.context, self.grant, self.path, self.call = context, grant, path, call
        self.model = None if call.choice.model == context.offer.population.name else call.choice.model
        """The model name to echo; None for the engine's own."""
        self.has_answered = False
        """Whether anything of the answer's body has come: from then on nothing is tried again. The head of a stream comes before
        anything is computed."""
        self.is_stream = False
        self.counted: Usage | None = None
        """The engine's own count, of a complete answer."""
        self.used: Usage | None = NO_USAGE
        """What the engine computed; None while that is unknown."""
        self.report = Report(
            offer=context.offer,
            tier=grant.tier,
            tiers=tiers,
            max_members=grant.in_flight.max_members,
            requested=call.choice.requested,
            time_budget=call.time_budget,
            prefix=_report_prefix(call),
        )
        self._reply = reply
        self._offsets = Offsets()
        deadline = grant.in_flight.finish_by if call.time_budget.stops_at_deadline else None
        self.wait = Wait(grant.engine, grant.in_flight, deadline=deadline, stall_s=context.stall_timeout_s)
        self.form = FORMS[call.kind]
        self._stream = self.form.stream(
            call,
            Additions(population=self.report.begin(), model=self.model),
            name=self.model or context.offer.population.name,
            at_end=self._end_choice if call.time_budget.budget_s is not None or self.report.prefix else None,
        )

    @property
    def engine(self) -> Engine:
        """The engine that it is tried on."""
        return self.grant.engine

    @property
    def additions(self) -> Additions:
        """What a complete answer gets, as of now."""
        return Additions(population=self.report.end(self.context.record.elapsed_s()), model=self.model)

    async def run(self) -> bytes | None:
        """Send the call, and pass a stream on. Returns the engine's answer where the client gets it whole, else None.

        Raises:
            ApiError: the engine's refusal.
            one of upstream.CONNECTION_ERRORS: the engine went away.
            upstream.InvalidResponseError: this is no engine's answer.
        """
        body = self._body()
        self.used = None
        answer = await upstream.send(self.context.session, self.engine, self.path, body, self.context.headers)
        self.is_stream = answer.status == 200 and answer.content_type == EVENT_STREAM
        self.has_answered = not self.is_stream
        try:
            if answer.status != 200:
                self.used = NO_USAGE
                raise await self._refusal(answer)
            return await self._pass_on(answer) if self.is_stream else await self._read_whole(await answer.read())
        finally:
            answer.close()

    def settle(self) -> None:
        """Count what the engine computed, however `run` ended."""
        self.used = self._computed()

    def cut_answer(self, usage: Usage) -> bytes:
        """A whole answer of what came so far."""
        return self._with_corrected_offsets(self._stream.cut_answer(usage))

    def cut_events(self, usage: Usage) -> bytes:
        """The events that end the stream here."""
        return self._stream.cut_events(usage, self.additions)

    async def begin_reply(self) -> None:
        """Send the head of a stream."""
        self.note_tier()
        await self._reply.begin_stream(self.report.served.name)

    def note_tier(self) -> None:
        """Record the tier that the answer amounts to, as far as it came."""
        self.context.record.tier_served = self.report.served.name
        self.context.record.is_shrunk = self.report.served.name != self.call.choice.tier.name

    def prompt_tokens(self) -> int:
        """Tokens of its prompts; an estimate until the engine has counted them."""
        return round(self.context.pool.prompt_tokens(self.call.size))

    def _body(self) -> bytes:
        request = self.grant.in_flight
        budget_s = None
        if request.finish_by is not None:
            budget_s = self.engine.reserve.after_reserve_s(request.finish_by - time.perf_counter())
        return self.call.body(
            self.grant.tier,
            budget_s=budget_s,
            floor=request.floor,
            max_members=request.max_members,
            expected_tokens=request.work.max_tokens,
            tokens_per_event=request.tokens_per_event,
            report_prefix=self.report.prefix,
        )

    async def _read_whole(self, body: bytes) -> bytes:
        with upstream.parsing():
            self.used = self.counted = self.form.read_usage(body)
            body = self.report.extract(body)
            if self.call.has_offsets:
                body = await asyncio.to_thread(self._offsets.correct, body)
        return body

    async def _pass_on(self, answer: aiohttp.ClientResponse) -> bytes | None:
        is_joined = self.call.streams_from_engine and not self.call.streams
        async for data in answer.content.iter_any():
            with upstream.parsing():
                events = self._stream.feed(data)
            self.has_answered = not self._stream.is_opening
            if not events:
                continue
            if self.call.has_offsets and not is_joined:
                events = self._offsets.correct_events(events)
            if num_events := self._stream.count(events):
                self.wait.note_events(num_events)
            if num_ended := len(FINISHED.findall(events)):
                self.context.admission.end_sequences(self.grant, num_ended)
            if is_joined:
                self._check(events)
            else:
                await self._send(events)
        self.used = self.counted = self._stream.usage
        if not self._stream.done:
            raise ConnectionError("the stream ended early")
        if not is_joined:
            return None
        if self.call.size.num_sequences > 1:
            self.report.computed = {}  # of the last choice alone
        return self._with_corrected_offsets(self._stream.answer())

    async def _send(self, events: bytes) -> None:
        """The head waits for the first event: what fails until then is answered with its own status.

        vLLM finds some faults of a request (a token that is not in the vocabulary) after it has begun to stream.
        """
        with self.wait.sending():
            if not self._reply.has_begun:
                self._check(events)
                self.context.record.first_token_s = self.context.record.elapsed_s()
                await self.begin_reply()
            await self._reply.send_events(events)

    def _end_choice(self, event: bytes) -> tuple[bytes, bytes]:
        event = self.report.extract_from_event(event)
        return event, self.report.end(self.context.record.elapsed_s())

    def _with_corrected_offsets(self, body: bytes) -> bytes:
        return self._offsets.correct(body) if self.call.has_offsets else body

    def _computed(self) -> Usage | None:
        """What the engine computed until now; None if that is unknown."""
        is_whole = not self.call.streams_from_engine or (self.has_answered and not self.is_stream)
        if self.used is not None or is_whole:
            return self.used
        size = self.call.size
        if self.wait.is_behind:  # the client takes nothing, while the engine goes on
            return Usage(prompt_tokens=self.prompt_tokens(), completion_tokens=size.total_tokens)
        counted = self._stream.usage or self._stream.usage_so_far(size.num_choices)
        if counted is not None and counted.prompt_tokens and size.num_prompts == 1:
            return counted
        if counted is not None:  # of some of the prompts, or of none if the engine counts them at the end
            return replace(counted, prompt_tokens=max(self.prompt_tokens(), counted.prompt_tokens))
        if self.grant.in_flight.num_tokens:  # an engine that does not count while it streams
            return None
        return Usage(prompt_tokens=self.prompt_tokens(), completion_tokens=0)

    async def _refusal(self, answer: aiohttp.ClientResponse) -> Exception:
        body = await answer.read()
        if not 400 <= answer.status < 500:
            if not self.call.is_constrained:
                self.engine.breaker.note_failure()
            if not await self.engine.check():
                return upstream.engine_lost(self.engine)
        return self._explained(engine_error(answer.status, body))

    def _check(self, events: bytes) -> None:
        if refusal := self._stream.refusal(events):
            self.used = NO_USAGE
            raise self._explained(refusal)

    def _explained(self, error: ApiError) -> ApiError:
        context_length = self.context.offer.population.context_length
        requested = None if self.call.size.max_tokens >= context_length else self.call.size.max_tokens
        if error.status == 500 and self.call.is_constrained:
            # The engine is well and fails on a grammar: that is the client's to change, and to pay for.
            self.used = None
            error = bad_request(
                "the engine failed on this request's structured output; make it simpler and less ambiguous.",
                code="structured_output_failed",
            )
        return explain_length(error, max_tokens=requested, context_length=context_length)


def _report_prefix(call: Call) -> str | None:
    """The prefix of the engine's report, if it can come: in a stream as a stop reason; in one whole answer, in a field."""
    if call.kind not in _WITH_STOP_REASON:
        return None
    if call.streams_from_engine:
        return new_report_prefix()
    return "" if call.size.num_sequences == 1 and call.time_budget.budget_s is None else None

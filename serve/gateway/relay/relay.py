"""Passing a call to an engine and its answer to the client, as it comes, with our additions."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import aiohttp
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission import quotas
from chorus.serve.gateway.admission.admission import Admission, Grant, deadline_exceeded
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.observe.drift import DriftSampler, Sample
from chorus.serve.gateway.observe.record import Record
from chorus.serve.gateway.relay.event_size import tokens_per_event
from chorus.serve.gateway.relay.forms import FORMS, Stream
from chorus.serve.gateway.relay.offsets import Offsets
from chorus.serve.gateway.relay.report import Report, new_mark
from chorus.serve.gateway.relay.splice import FINISHED, Additions
from chorus.serve.gateway.relay.wait import Stop, StoppedError, Wait
from chorus.serve.gateway.request.call import Call, Kind
from chorus.serve.gateway.request.errors import (
    ApiError,
    bad_gateway,
    bad_request,
    engine_error,
    explain_length,
    respond,
    unavailable,
)
from chorus.serve.gateway.request.keys import Tenant
from chorus.serve.gateway.request.offer import Offer
from chorus.serve.gateway.request.size import NO_USAGE, Usage
from chorus.serve.gateway.shared.store import Store
from chorus.serve.gateway.transport.disconnects import cancel, disconnected

logger = logging.getLogger(__name__)

TIER_HEADER = b"x-chorus-tier"
_EVENT_STREAM = "text/event-stream"
_WITH_STOP_REASON: tuple[Kind, ...] = ("completion", "chat")
"""APIs whose streams carry the engine's stop reason as it is, and with it the report."""
_WITH_ECHO: tuple[Kind, ...] = ("completion", "chat")
"""Those that answer with log-probabilities of the prompt."""
_ECHO_HEADERS = ("Content-Type", "authorization")


@dataclass(frozen=True, kw_only=True)
class RequestContext:
    """What a request needs on its way to an engine and back."""

    session: aiohttp.ClientSession
    pool: Pool
    admission: Admission
    store: Store
    drift: DriftSampler
    offer: Offer
    tenant: Tenant
    headers: dict[str, str]
    record: Record
    stall_timeout_s: float
    """Longest silence in the middle of a stream."""


@dataclass(kw_only=True, eq=False)
class _Attempt:
    """One try on one engine."""

    grant: Grant
    exchange: Wait
    report: Report
    splicer: Stream
    joins: bool
    """Whether the engine's stream becomes a whole answer."""
    offsets: Offsets = field(default_factory=Offsets)
    has_answered: bool = False
    """Whether anything of the answer's body has come: from then on nothing is tried again. The head of a stream comes when nothing
    is computed yet."""
    is_stream: bool = False
    used: Usage | None = NO_USAGE
    """What the engine computed, where that is known at once: before it is asked, of a whole answer, and when it refuses."""

    @property
    def engine(self) -> Engine:
        return self.grant.engine


class _LostError(Exception):
    """The engine went away before it began to answer."""


class Relay(Response):
    """The answer of an engine. A client that leaves takes the engine's request with it, by closing the connection."""

    def __init__(self, context: RequestContext, *, path: str, call: Call, tiers: Sequence[Tier]) -> None:
        super().__init__()
        self._context = context
        self._path = path
        self._call = call
        self._tiers = tiers
        self._form = FORMS[call.kind]
        self._record = context.record
        self._model = None if call.choice.model == context.offer.population.name else call.choice.model
        self._has_begun = False
        self._is_complete = False
        self._used: Usage | None = NO_USAGE
        """What was computed for it; None where that does not show."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(send))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the gateway stops, and has waited as long as it was told to
            await cancel(answering)
            await self._break_off(scope, receive, send, "the gateway was stopped")
            raise
        finally:
            await cancel(leaving)
            await cancel(answering)
        if not answering.cancelled():
            answering.result()

    async def _answer(self, send: Send) -> None:
        """Serve within the tenant's rates."""
        context, size = self._context, self._call.size
        tokens = context.pool.prompt_tokens(size) + size.total_tokens
        async with quotas.charged(context.store, context.tenant, tokens) as bill:
            try:
                await self._serve(send)
            finally:
                bill.used = self._record.usage = self._used

    async def _serve(self, send: Send) -> None:
        """Try an engine, and after a loss before the first byte once more: elsewhere, or there if it is well."""
        avoid: tuple[Engine, ...] = ()
        for is_last in (False, True):
            async with self._context.admission.admitted(
                self._call, self._context.tenant, self._tiers, arrived_at=self._record.began_at, avoid=avoid
            ) as grant:
                self._note(grant)
                try:
                    await self._try(grant, send)
                except _LostError:
                    grant.engine.breaker.note_failure()
                    # Who is known to be down is not asked: a frozen one would keep the request for as long as a probe may take.
                    is_well = grant.engine.is_up and await grant.engine.check()
                    others = [each for each in self._context.pool.engines if each is not grant.engine and each.is_up]
                    if is_last or not (is_well or others):
                        raise upstream.lost(grant.engine) from None
                    avoid = (grant.engine,) if others else ()
                else:
                    return
                finally:
                    grant.in_flight.generated = None if self._used is None else self._used.completion_tokens

    async def _try(self, grant: Grant, send: Send) -> None:
        attempt = self._attempt(grant)
        self._context.pool.note(self._call, grant.engine)
        grant.engine.breaker.note_try()
        try:
            async with attempt.exchange:
                try:
                    await self._ask(attempt, send)
                finally:
                    self._used = self._computed(attempt)
        except StoppedError as stopped:
            await self._stop(attempt, stopped.why, send)
        except upstream.BROKEN:
            await self._lose(attempt, Stop.LOST, send)
        except upstream.GarbledError as error:
            logger.warning("engine %s: %s", grant.engine.url, error)
            grant.engine.breaker.note_failure()
            if not self._has_begun:
                raise bad_gateway(upstream.NO_ANSWER) from None
            self._record.is_broken = True
            await self._end(send, self._form.error_event(bad_gateway(upstream.NO_ANSWER)))

    def _attempt(self, grant: Grant) -> _Attempt:
        call, record = self._call, self._record
        has_budget = call.terms.budget_s is not None
        report = Report(
            offer=self._context.offer,
            tier=grant.tier,
            tiers=self._tiers,
            most_members=grant.in_flight.most_members,
            asked=call.choice.asked,
            terms=call.terms,
            mark=self._report_mark(),
        )
        additions = Additions(population=report.begin(), model=self._model)

        def at_end(event: bytes) -> tuple[bytes, bytes]:
            event = report.take_from_event(event)
            return event, report.end(record.elapsed_s())

        name = self._model or self._context.offer.population.name
        splicer = self._form.stream(call, additions, name=name, at_end=at_end if has_budget or report.mark else None)
        deadline = grant.in_flight.finish_by if call.terms.stops_at_deadline else None
        grant.in_flight.tokens_per_event = call.tokens_per_event or tokens_per_event(grant.in_flight.expected_token_s)
        return _Attempt(
            grant=grant,
            exchange=Wait(grant, deadline=deadline, stall_s=self._context.stall_timeout_s),
            report=report,
            splicer=splicer,
            joins=call.streams_from_engine and not call.streams,
        )

    def _report_mark(self) -> str | None:
        """How the engine's report is to begin, if it can come: in a stream as a stop reason; of one whole answer, in a field."""
        call = self._call
        if call.kind not in _WITH_STOP_REASON:
            return None
        if call.streams_from_engine:
            return new_mark()
        return "" if call.size.num_sequences == 1 and call.terms.budget_s is None else None

    async def _ask(self, attempt: _Attempt, send: Send) -> None:
        grant, call = attempt.grant, self._call
        budget_s = None
        if grant.in_flight.finish_by is not None:
            budget_s = grant.engine.reserve.after_reserve_s(grant.in_flight.finish_by - time.perf_counter())
        body = call.body(
            grant.tier,
            budget_s=budget_s,
            floor=grant.in_flight.floor,
            most_members=grant.in_flight.most_members,
            expected_tokens=grant.in_flight.work.max_tokens,
            tokens_per_event=grant.in_flight.tokens_per_event,
            report_mark=attempt.report.mark,
        )
        attempt.used = None
        answer = await upstream.send(self._context.session, grant.engine, self._path, body, self._context.headers)
        attempt.is_stream = answer.status == 200 and answer.content_type == _EVENT_STREAM
        attempt.has_answered = not attempt.is_stream
        try:
            if answer.status != 200:
                attempt.used = NO_USAGE
                raise await self._refusal(attempt, answer)
            if attempt.is_stream:
                await self._stream(attempt, answer, send)
            else:
                await self._whole(attempt, await answer.read(), send)
        finally:
            answer.close()

    async def _refusal(self, attempt: _Attempt, answer: aiohttp.ClientResponse) -> Exception:
        body = await answer.read()
        if not 400 <= answer.status < 500:
            if not self._call.is_constrained:
                attempt.engine.breaker.note_failure()
            if not await attempt.engine.check():
                return upstream.lost(attempt.engine)
        return self._explained(attempt, engine_error(answer.status, body))

    def _check(self, attempt: _Attempt, events: bytes) -> None:
        if refusal := attempt.splicer.refusal(events):
            attempt.used = NO_USAGE
            raise self._explained(attempt, refusal)

    def _fault(self, attempt: _Attempt, error: ApiError) -> ApiError:
        """The engine's error. Where it is well and fails on a grammar, that is the client's to change, and to pay for."""
        if error.status != 500 or not self._call.is_constrained:
            return error
        attempt.used = None
        return bad_request(
            "the engine could not follow the structured output that this request asks for; make it simpler, and less ambiguous.",
            code="structured_output_failed",
        )

    async def _whole(self, attempt: _Attempt, body: bytes, send: Send) -> None:
        with upstream.making_sense():
            attempt.used = self._used = self._form.read_usage(body)
            body = attempt.report.take(body)
            if self._call.has_offsets:
                body = await asyncio.to_thread(attempt.offsets.mend, body)
        self._finish(attempt, streamed=False)
        await self._send_whole(attempt, body, send)

    async def _stream(self, attempt: _Attempt, answer: aiohttp.ClientResponse, send: Send) -> None:
        splicer = attempt.splicer
        async for data in answer.content.iter_any():
            with upstream.making_sense():
                events = splicer.feed(data)
            attempt.has_answered = not splicer.is_opening
            if not events:
                continue
            if self._call.has_offsets and not attempt.joins:
                events = attempt.offsets.mend_events(events)
            if num_events := splicer.count(events):
                attempt.exchange.heard(num_events)
            if num_ended := len(FINISHED.findall(events)):
                self._context.admission.end_sequences(attempt.grant, num_ended)
            await self._pass_on(attempt, events, send)
        attempt.used = self._used = splicer.usage
        if not splicer.done:
            await self._lose(attempt, Stop.LOST, send)
            return
        self._finish(attempt, streamed=True)
        if attempt.joins:
            if self._call.size.num_sequences > 1:
                attempt.report.computed = {}  # one choice's, where all are meant
            await self._send_whole(attempt, self._mended(attempt, splicer.answer()), send)
        else:
            await self._end(send)

    async def _pass_on(self, attempt: _Attempt, events: bytes, send: Send) -> None:
        if attempt.joins:
            self._check(attempt, events)
            return
        with attempt.exchange.sending():
            if not self._has_begun:
                await self._begin_stream(attempt, events, send)
            await send({"type": "http.response.body", "body": events, "more_body": True})

    async def _begin_stream(self, attempt: _Attempt, events: bytes, send: Send) -> None:
        """Send the head, which waited for the first event: what fails until then is answered with its own status.

        vLLM finds some faults of a request (a token that is not in the vocabulary) after it has begun to stream.
        """
        self._check(attempt, events)
        self._record.first_token_s = self._record.elapsed_s()
        await self._start(attempt, send, f"{_EVENT_STREAM}; charset=utf-8")

    async def _stop(self, attempt: _Attempt, why: Stop, send: Send) -> None:
        """The wait was ended before the answer was."""
        match why:
            case Stop.DEADLINE if self._call.terms.on_deadline == "truncate":
                await self._truncate(attempt, send)
            case Stop.DEADLINE:
                self._note_deadline(attempt, is_met=False)
                self._note_length(is_cut=True)
                error = deadline_exceeded("the time budget was spent before the answer was complete.")
                if not self._has_begun:
                    raise error
                self._record.is_broken = True
                await self._end(send, self._form.error_event(error))
            case Stop.STUCK:
                self._record.is_broken = (
                    True  # and the server, which misses the end of the answer, closes the connection
                )
            case _:
                await self._lose(attempt, why, send)

    async def _lose(self, attempt: _Attempt, why: Stop, send: Send) -> None:
        """The engine's answer broke off: an error event if some of it is with the client, another try if nothing of it had come."""
        if not self._has_begun:
            attempt.used = self._used = NO_USAGE  # the client has nothing of it
        if not attempt.has_answered:
            raise _LostError
        attempt.engine.breaker.note_failure()
        if self._has_begun:
            attempt.engine.suspect()
            await self._end_broken(send, why.value)
        else:
            if attempt.engine.is_up:
                await attempt.engine.check()
            raise upstream.lost(attempt.engine)

    async def _truncate(self, attempt: _Attempt, send: Send) -> None:
        """Return what there is."""
        attempt.report.is_truncated = self._record.is_truncated = True
        self._record.num_drops = attempt.report.num_drops
        self._note_deadline(attempt, is_met=self._record.elapsed_s() <= (self._call.terms.budget_s or 0.0))
        usage = self._used or Usage(
            prompt_tokens=self._prompt_tokens(), completion_tokens=attempt.grant.in_flight.num_tokens
        )
        self._note_length(is_cut=True)
        if not self._call.streams:
            await self._send_whole(attempt, self._mended(attempt, attempt.splicer.cut_answer(usage)), send)
            return
        additions = Additions(population=attempt.report.end(self._record.elapsed_s()), model=self._model)
        if not self._has_begun:
            await self._start(attempt, send, f"{_EVENT_STREAM}; charset=utf-8")
        await self._end(send, attempt.splicer.cut_events(usage, additions))

    def _computed(self, attempt: _Attempt) -> Usage | None:
        """What the engine computed until now; None while that does not show."""
        is_whole = not self._call.streams_from_engine or (attempt.has_answered and not attempt.is_stream)
        if attempt.used is not None or is_whole:
            return attempt.used
        size = self._call.size
        if attempt.exchange.is_behind:  # the client takes nothing, and the engine goes on behind what lies ready for it
            return Usage(prompt_tokens=self._prompt_tokens(), completion_tokens=size.total_tokens)
        counted = attempt.splicer.usage or attempt.splicer.usage_so_far(size.num_choices)
        if counted is not None and counted.prompt_tokens and size.num_prompts == 1:
            return counted
        if (
            counted is not None
        ):  # of the prompts that came to their turn, or of none, where the engine counts them at the end
            return replace(counted, prompt_tokens=max(self._prompt_tokens(), counted.prompt_tokens))
        if attempt.grant.in_flight.num_tokens:  # an engine that does not count on the way
            return None
        return Usage(prompt_tokens=self._prompt_tokens(), completion_tokens=0)

    def _prompt_tokens(self) -> int:
        """Its prompts' length, as far as it is known before the engine counts them."""
        return round(self._context.pool.prompt_tokens(self._call.size))

    async def _send_whole(self, attempt: _Attempt, body: bytes, send: Send) -> None:
        population = attempt.report.end(self._record.elapsed_s())
        body = self._form.whole(body, Additions(population=population, model=self._model))
        await self._start(attempt, send, "application/json", content_length=len(body))
        await self._end(send, body)

    def _finish(self, attempt: _Attempt, *, streamed: bool) -> None:
        """The engine's answer is complete."""
        attempt.engine.breaker.note_success()
        if self._has_begun:
            self._note_tier(attempt)  # members may have left since
        self._record.num_drops = attempt.report.num_drops
        budget_s = self._call.terms.budget_s
        if budget_s is not None:
            self._note_deadline(attempt, is_met=self._record.elapsed_s() <= budget_s)
        self._note_length()
        attempt.exchange.teach(
            self._used,
            streamed=streamed,
            characters=0 if self._call.size.prompt_tokens else self._call.size.prompt_characters,
        )
        if self._call.kind not in _WITH_ECHO:
            return
        headers = {name: value for name, value in self._context.headers.items() if name in _ECHO_HEADERS}
        self._context.drift.draw(Sample(path=self._path, call=self._call, tier=attempt.grant.tier, headers=headers))

    def _note_length(self, *, is_cut: bool = False) -> None:
        """Learn how long answers are, where the request did not say."""
        usage = self._used
        if usage is not None or is_cut:
            tokens = 0.0 if usage is None else usage.completion_tokens / self._call.size.num_sequences
            lengths = self._context.admission.lengths
            lengths.observe(self._call.size, self._context.tenant.name, tokens, is_cut=is_cut)

    def _mended(self, attempt: _Attempt, body: bytes) -> bytes:
        return attempt.offsets.mend(body) if self._call.has_offsets else body

    def _explained(self, attempt: _Attempt, error: ApiError) -> ApiError:
        context_length = self._context.offer.population.context_length
        asked = None if self._call.size.max_tokens >= context_length else self._call.size.max_tokens
        return explain_length(self._fault(attempt, error), max_tokens=asked, context_length=context_length)

    def _note_tier(self, attempt: _Attempt) -> None:
        self._record.tier_served = attempt.report.served.name
        self._record.is_shrunk = attempt.report.served.name != self._call.choice.tier.name

    def _note_deadline(self, attempt: _Attempt, *, is_met: bool) -> None:
        self._record.is_deadline_met = is_met
        usage, in_flight = self._used, attempt.grant.in_flight
        # An answer that became longer than it was planned says nothing of the engine.
        is_longer = usage is not None and usage.completion_tokens > in_flight.num_sequences * in_flight.work.max_tokens
        if attempt.grant.is_promised and not is_longer:
            kept = is_met and not attempt.report.is_truncated
            attempt.engine.reserve.observe(late=not kept)
            attempt.engine.model.observe_promise(kept=kept, probability=self._context.admission.limits.probability)

    def _note(self, grant: Grant) -> None:
        self._record.engine = grant.engine.url
        self._record.waited_s = grant.waited_s
        self._record.budget_s = self._call.terms.budget_s

    async def _start(
        self, attempt: _Attempt, send: Send, content_type: str, *, content_length: int | None = None
    ) -> None:
        self._has_begun = True
        self._note_tier(attempt)
        headers = [(b"content-type", content_type.encode()), (TIER_HEADER, attempt.report.served.name.encode())]
        if content_length is None:
            # no proxy is to hold events back
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            headers.append((b"content-length", str(content_length).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _break_off(self, scope: Scope, receive: Receive, send: Send, why: str) -> None:
        if not self._has_begun:
            message = f"{why} before this request was answered; send it again."
            await respond(unavailable(message, retry_after_s=1), self._path)(scope, receive, send)
        elif not self._is_complete:
            await self._end_broken(send, why)

    async def _end_broken(self, send: Send, why: str) -> None:
        self._record.is_broken = True
        error = ApiError(503, f"{why} before this stream was complete; send the request again.", code="stream_broken")
        await self._end(send, self._form.error_event(error))

    async def _end(self, send: Send, body: bytes = b"") -> None:
        self._is_complete = True
        await send({"type": "http.response.body", "body": body})

"""A request's way to an engine and the answer's way back: charged, admitted, tried, once more after an early loss, and ended."""

import asyncio
import logging
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chorus.population.manifest import Tier
from chorus.serve.gateway.admission import quotas
from chorus.serve.gateway.admission.admission import deadline_exceeded
from chorus.serve.gateway.admission.queue import Grant
from chorus.serve.gateway.engines import upstream
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.relay import outcome
from chorus.serve.gateway.relay.attempt import Attempt
from chorus.serve.gateway.relay.context import RequestContext
from chorus.serve.gateway.relay.forms import FORMS
from chorus.serve.gateway.relay.reply import Reply, stream_broken
from chorus.serve.gateway.relay.wait import Stop, StoppedError
from chorus.serve.gateway.request.call import Call
from chorus.serve.gateway.request.errors import bad_gateway, respond, unavailable
from chorus.serve.gateway.request.size import NO_USAGE, Usage
from chorus.serve.gateway.transport.disconnects import cancel, disconnected

logger = logging.getLogger(__name__)


class _EngineLostError(Exception):
    """The engine went away before it began to answer."""


class Relay(Response):
    """The answer of an engine. A client that leaves takes the engine's request with it, by closing the connection."""

    def __init__(self, context: RequestContext, *, path: str, call: Call, tiers: Sequence[Tier]) -> None:
        super().__init__()
        self._context = context
        self._path = path
        self._call = call
        self._tiers = tiers
        self._record = context.record
        self._used: Usage | None = NO_USAGE
        """What engines computed for it; None if that is unknown."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, self._record, FORMS[self._call.kind], stall_s=self._context.stall_timeout_s)
        answering = asyncio.create_task(self._answer(reply))
        leaving = asyncio.create_task(disconnected(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the gateway stops, and its time to drain is over
            await cancel(answering)
            await self._abort(reply, scope, receive, send)
            raise
        finally:
            await cancel(leaving)
            await cancel(answering)
        if not answering.cancelled():
            answering.result()

    async def _answer(self, reply: Reply) -> None:
        """Serve within the tenant's rates."""
        context, size = self._context, self._call.size
        tokens = context.pool.prompt_tokens(size) + size.total_tokens
        async with quotas.charged(context.store, context.tenant, tokens) as bill:
            try:
                await self._serve(reply)
            finally:
                bill.used = self._record.usage = self._used

    async def _serve(self, reply: Reply) -> None:
        """Try an engine, and after a loss before the first byte once more: on another one, or on the same if it is well."""
        avoid: tuple[Engine, ...] = ()
        for is_last in (False, True):
            async with self._context.admission.admitted(
                self._call, self._context.tenant, self._tiers, arrived_at=self._record.began_at, avoid=avoid
            ) as grant:
                self._note(grant)
                try:
                    await self._try(grant, reply)
                except _EngineLostError:
                    others = await self._after_loss(grant.engine)
                    if is_last or others is None:
                        raise upstream.engine_lost(grant.engine) from None
                    avoid = (grant.engine,) if others else ()
                else:
                    return
                finally:
                    grant.engine.traffic.note_generated(
                        grant.in_flight, None if self._used is None else self._used.completion_tokens
                    )

    async def _try(self, grant: Grant, reply: Reply) -> None:
        """One try on one engine, ended as the wait for it ended."""
        attempt = Attempt(self._context, grant, reply, path=self._path, call=self._call, tiers=self._tiers)
        grant.engine.breaker.note_attempt()
        try:
            async with attempt.wait:
                try:
                    body = await attempt.run()
                finally:
                    attempt.settle()
            outcome.note_complete(attempt)
            await self._complete(attempt, reply, body)
        except StoppedError as stopped:
            await self._stop(attempt, reply, stopped.reason)
        except upstream.CONNECTION_ERRORS:
            await self._handle_loss(attempt, reply, Stop.LOST)
        except upstream.InvalidResponseError as error:
            logger.warning("engine %s: %s", grant.engine.url, error)
            grant.engine.breaker.note_failure()
            await reply.fail(bad_gateway(upstream.INVALID_RESPONSE))
        finally:
            self._used = attempt.used

    async def _complete(self, attempt: Attempt, reply: Reply, body: bytes | None) -> None:
        """End a stream, or send the whole answer."""
        if body is None:
            await reply.end()
        else:
            await reply.send_whole(attempt.report.served.name, attempt.form.whole(body, attempt.additions))

    async def _stop(self, attempt: Attempt, reply: Reply, why: Stop) -> None:
        """The wait ended before the answer did."""
        match why:
            case Stop.DEADLINE if self._call.time_budget.on_deadline == "truncate":
                await self._truncate(attempt, reply)
            case Stop.DEADLINE:
                outcome.note_missed(attempt)
                await reply.fail(
                    deadline_exceeded(
                        "latency_budget_ms passed before the answer was complete; raise it or lower max_tokens."
                    )
                )
            case Stop.STUCK:
                self._record.is_broken = True  # the server misses the end of the answer and closes the connection
            case _:
                await self._handle_loss(attempt, reply, why)

    async def _truncate(self, attempt: Attempt, reply: Reply) -> None:
        """Return what came until the deadline."""
        outcome.note_truncated(attempt)
        usage = attempt.used or Usage(
            prompt_tokens=attempt.prompt_tokens(), completion_tokens=attempt.grant.in_flight.num_tokens
        )
        if not self._call.streams:
            await self._complete(attempt, reply, attempt.cut_answer(usage))
            return
        events = attempt.cut_events(usage)
        if not reply.has_begun:
            await attempt.begin_reply()
        await reply.end(events)

    async def _handle_loss(self, attempt: Attempt, reply: Reply, why: Stop) -> None:
        """The engine's answer broke off: an error event if some of it is with the client, another try if nothing had come."""
        if not reply.has_begun:
            attempt.used = NO_USAGE  # the client has nothing of it
        if not attempt.has_answered:
            raise _EngineLostError
        attempt.engine.breaker.note_failure()
        if reply.has_begun:
            attempt.engine.check_soon()
            await reply.fail(stream_broken(why.value))
        else:
            if attempt.engine.is_up:
                await attempt.engine.check()
            raise upstream.engine_lost(attempt.engine)

    async def _after_loss(self, engine: Engine) -> list[Engine] | None:
        """The other engines to try after the loss of one; None if there is none and the lost one is not well."""
        engine.breaker.note_failure()
        # One that is down is not probed: if it is frozen, the probe would hold the request up until its timeout.
        is_well = engine.is_up and await engine.check()
        others = [each for each in self._context.pool.engines if each is not engine and each.is_up]
        return others if is_well or others else None

    def _note(self, grant: Grant) -> None:
        self._record.engine = grant.engine.url
        self._record.waited_s = grant.waited_s
        self._record.budget_s = self._call.time_budget.budget_s

    async def _abort(self, reply: Reply, scope: Scope, receive: Receive, send: Send) -> None:
        """The gateway stops while the request is answered."""
        why = "the gateway shut down"
        if not reply.has_begun:
            message = f"{why} before it answered this request; send the request again."
            await respond(unavailable(message, retry_after_s=1), self._path)(scope, receive, send)
        elif not reply.is_complete:
            await reply.fail(stream_broken(why))

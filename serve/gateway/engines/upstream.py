"""HTTP to the engine, over pooled connections.

aiohttp rather than httpx: a chunk of a stream costs aiohttp 40 us of processor time and httpx 165 us (sixteen streams, two cores),
and the engine runs on the same cores.
"""

import asyncio
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import aiohttp

from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.request.errors import ApiError, bad_gateway, engine_error, unavailable

logger = logging.getLogger(__name__)

CONNECTION_ERRORS = (aiohttp.ClientError, ConnectionError)
"""Exceptions raised while reading an answer when the engine goes away."""
INVALID_RESPONSE = "the engine sent an invalid response; see the logs of the engine and the gateway."
_KEEP_ALIVE_S = 4.0  # vLLM closes idle connections after 5 s; a request sent at that moment would need the retry
_CONNECT_TIMEOUT_S = 5.0
_REACH_TIMEOUT_S = 15.0  # includes the name lookup, which may hang


class InvalidResponseError(Exception):
    """An engine's answer is malformed."""


def open_session() -> aiohttp.ClientSession:
    """A session without a connection limit (the engine queues) and without a read timeout (a token may take long)."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, connect=_REACH_TIMEOUT_S, sock_connect=_CONNECT_TIMEOUT_S),
        skip_auto_headers=("Accept-Encoding", "User-Agent"),
        auto_decompress=False,
    )


async def send(
    session: aiohttp.ClientSession, engine: Engine, path: str, body: bytes, headers: Mapping[str, str]
) -> aiohttp.ClientResponse:
    """Send a request to the engine and wait for the head of its answer. The caller closes the response.

    Raises:
        one of CONNECTION_ERRORS: the engine cannot be reached or went away.
    """
    return await session.post(engine.url + path, data=body, headers=headers, allow_redirects=False)


async def fetch(
    session: aiohttp.ClientSession,
    engine: Engine,
    path: str,
    body: bytes,
    headers: Mapping[str, str],
    *,
    limit_s: float,
) -> bytes:
    """A short answer as a whole: a JSON object. Cancelling this cancels the engine's request.

    Raises:
        ApiError: 503 if the engine cannot be reached (tried twice if it is healthy); 504 after `limit_s`; 502 if the
            answer is not a JSON object; otherwise the engine's own error (`engine_error`).
    """
    for is_last in (False, True):
        try:
            async with asyncio.timeout(limit_s), await send(session, engine, path, body, headers) as answer:
                found = await answer.read()
        except CONNECTION_ERRORS as error:
            logger.info("engine %s: %s", engine.url, error)
            # Either an idle connection broke or the engine did. Only a healthy engine is worth a second try.
            if is_last or not await engine.check():
                break
        except TimeoutError:
            engine.check_soon()
            message = f"the engine did not answer within {limit_s:g} s; send a smaller request or try again."
            raise ApiError(504, message, code="engine_timeout") from None
        else:
            if answer.status != 200:
                raise engine_error(answer.status, found)
            if not is_object(found):
                raise bad_gateway(INVALID_RESPONSE)
            return found
    engine.check_soon()
    raise engine_lost(engine)


@contextmanager
def parsing() -> Iterator[None]:
    """Wraps code that parses an engine's output.

    Raises:
        InvalidResponseError: the output is malformed.
    """
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidResponseError(f"{type(error).__name__}: {error}") from error


def is_object(body: bytes) -> bool:
    """Whether `body` is a JSON object."""
    try:
        return isinstance(json.loads(body), dict)
    except (ValueError, RecursionError):
        return False


def engine_lost(engine: Engine) -> ApiError:
    """The 503 for a request whose engine went away before the first byte of its answer."""
    retry_after_s = engine.retry_after_s()
    return unavailable(
        f"the connection to the engine was lost before it answered; try again in about {retry_after_s} s.",
        retry_after_s=retry_after_s,
    )

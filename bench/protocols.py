"""Processor time of uvicorn's HTTP protocols and of ours, which wraps one of them: `python -m bench.protocols`.

A dummy transport takes and gives the bytes, so that only the protocol and a trivial app are measured. Reports the minimum over
alternating rounds, since other work on the machine can only add time.
"""

import asyncio
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from chorus.serve.gateway.transport.connections import Connection, ConnectionLimits, Connections

NUM_EVENTS = 200
EVENT = b"data: " + b"x" * 150 + b"\n\n"
HEADERS = b"Authorization: Bearer abcdefabcdef\r\nContent-Type: application/json\r\nUser-Agent: OpenAI/Python\r\nAccept: */*\r\n"


class _Transport(asyncio.Transport):
    def write(self, data: object) -> None:
        pass

    def close(self) -> None:
        pass

    def is_closing(self) -> bool:
        return False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def get_write_buffer_size(self) -> int:
        return 0


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer with a stream of events, or with one event as a whole."""
    streams = json.loads((await receive())["body"])["stream"]
    length = [] if streams else [(b"content-length", str(len(EVENT)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    if streams:
        for _ in range(NUM_EVENTS):
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
    await send({"type": "http.response.body", "body": b"" if streams else EVENT})


async def seconds(make: Callable[..., Any], config: uvicorn.Config, *, streams: bool, num: int) -> float:
    """Processor time per request."""
    state = ServerState()
    protocol = make(config=config, server_state=state, app_state={})
    protocol.connection_made(_Transport())
    body = json.dumps({"prompt": "a", "stream": streams}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n%s" % (HEADERS, len(body), body)
    began_at = time.process_time()
    for _ in range(num):
        protocol.data_received(request)
        while state.tasks:
            await asyncio.sleep(0)
    taken_s = time.process_time() - began_at
    protocol.connection_lost(None)
    return taken_s / num


async def main() -> None:
    """Print a row for each protocol."""
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", proxy_headers=False)
    config.load()
    limits = Connections(ConnectionLimits())
    protocols = {"httptools": HttpToolsProtocol, "ours": partial(Connection, limits), "h11": H11Protocol}
    whole, streamed = dict.fromkeys(protocols, 1.0), dict.fromkeys(protocols, 1.0)
    gc.disable()
    for _ in range(15):
        for name, make in protocols.items():
            whole[name] = min(whole[name], await seconds(make, config, streams=False, num=500))
            streamed[name] = min(streamed[name], await seconds(make, config, streams=True, num=10))
        gc.collect()
    for name in protocols:
        event_s = (streamed[name] - whole[name]) / NUM_EVENTS
        print(f"| {name} | {1e6 * whole[name]:.0f} us | {1e6 * event_s:.1f} us |")


if __name__ == "__main__":
    uvloop.run(main())

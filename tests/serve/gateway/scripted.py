"""A fake engine that follows a test's script, in place of a real one: HTTP on a local port.

`python scripted.py PORT` runs it as a process that the supervisor can launch and a test can kill.
"""

import asyncio
import json
import sys
import threading
from collections.abc import Sequence
from typing import Any

import uvicorn

Step = bytes | float
"""Bytes to send, or seconds to wait."""


class BreakOffError(Exception):
    """Breaks off an answer: uvicorn then closes the connection."""


def event(text: str, **fields: Any) -> bytes:
    """A server-sent event in vLLM's format."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "tiny", "choices": [choice], **fields}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


USAGE = event("", choices=[], usage={"prompt_tokens": 4, "total_tokens": 7, "completion_tokens": 3})
DONE = b"data: [DONE]\n\n"
WHOLE = event("abc", usage={"prompt_tokens": 4, "total_tokens": 7, "completion_tokens": 3})[6:-2]


class ScriptedEngine:
    """An ASGI app. Set `steps` and the other attributes before a request; read `bodies` and `headers` after it."""

    def __init__(self, steps: Sequence[Step] = (), *, then_break: bool = False) -> None:
        self.steps: Sequence[Step] = steps
        self.then_break = then_break
        self.status = 200
        self.content_type = "text/event-stream; charset=utf-8"
        self.is_healthy = True
        self.is_frozen = False
        """Whether no request is answered, not even /health."""
        self.is_stuck = False
        """Whether it reports that it is healthy but answers no generation request."""
        self.num_tokens = 0
        self.models: Any = []
        """The models that /v1/models lists."""
        self.member_logprobs: dict[str, list[float]] = {}
        """Log-probabilities, by member, of every prompt after its first token, for requests to a single member."""
        self.is_slow_for_members = False
        """Whether requests to a single member are answered by `steps` instead."""
        self.echo = False
        """Whether each request is answered with its own prompt."""
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.break_before_answer = 0
        """How many of the next requests lose their connection before the first byte."""
        self.break_after_head = 0
        """How many of the next requests lose it after the answer's head."""
        self.client_left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})
            return
        while self.is_frozen:
            await asyncio.sleep(0.05)
        if scope["path"] == "/health":
            await _send_whole(send, 200 if self.is_healthy else 503, b"")
            return
        if scope["path"] == "/metrics":
            await _send_whole(send, 200, b'vllm:generation_tokens_total{engine="0"} %d\n' % self.num_tokens)
            return
        if scope["path"] == "/v1/models":
            await _send_whole(send, 200, json.dumps({"data": self.models}).encode())
            return
        while self.is_stuck:
            await asyncio.sleep(0.05)
        body = await self._note(scope, receive)
        if self.echo:
            await self._echo(send, body)
            return
        member = body.get("vllm_xargs", {}).get("chorus_member")
        if member is not None and not self.is_slow_for_members:
            logprobs = {"token_logprobs": [None, *self.member_logprobs[member]]}
            await _send_whole(send, 200, json.dumps({"choices": [{"logprobs": logprobs}]}).encode())
            return
        if self.break_before_answer:
            self.break_before_answer -= 1
            send.__self__.transport.abort()  # uvicorn's transport; ASGI has no message to abort a connection
            return
        if self.break_after_head:
            self.break_after_head -= 1
            headers = [(b"content-type", self.content_type.encode())]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await asyncio.sleep(0.05)
            send.__self__.transport.abort()
            return
        answering = asyncio.create_task(self._answer(send))
        leaving = asyncio.create_task(receive())
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            answering.cancel()
            self.client_left.set()
            return
        leaving.cancel()
        answering.result()

    async def _echo(self, send: Any, body: dict[str, Any]) -> None:
        whole = event(str(body.get("prompt")))
        events = whole + USAGE + DONE if body.get("stream") else whole[6:-2]
        kind = b"text/event-stream" if body.get("stream") else b"application/json"
        await asyncio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": events})

    async def _note(self, scope: Any, receive: Any) -> dict[str, Any]:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.bodies.append(json.loads(body))
        self.headers.append({name.decode(): value.decode() for name, value in scope["headers"]})
        return self.bodies[-1]

    async def _answer(self, send: Any) -> None:
        headers = [(b"content-type", self.content_type.encode())]
        began = False
        for step in self.steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            if not began:
                await send({"type": "http.response.start", "status": self.status, "headers": headers})
                began = True
            await send({"type": "http.response.body", "body": step, "more_body": True})
        if self.then_break:
            raise BreakOffError
        await send({"type": "http.response.body", "body": b""})


async def _send_whole(send: Any, status: int, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    print("scripted engine starts", flush=True)
    slow = ScriptedEngine([event("a"), *([0.05, event("b")] * 40), USAGE, DONE])
    uvicorn.run(slow, port=int(sys.argv[1]), log_level="warning")

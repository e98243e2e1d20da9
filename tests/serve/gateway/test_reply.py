"""The client's side of an answer: one head, one end, and no waiting for a client that takes nothing."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest

from chorus.serve.gateway.observe.record import Record
from chorus.serve.gateway.relay.forms import FORMS
from chorus.serve.gateway.relay.reply import Reply
from chorus.serve.gateway.request.errors import ApiError

FAILED = ApiError(503, "lost", code="stream_broken")


class Client:
    """A client that takes nothing from `stuck_at` messages on."""

    def __init__(self, *, stuck_at: int = 99) -> None:
        self.record = Record(request_id="r")
        self.reply = Reply(self._take, self.record, FORMS["completion"], stall_s=0.05)
        self.messages: list[MutableMapping[str, Any]] = []
        self._stuck_at = stuck_at

    async def _take(self, message: MutableMapping[str, Any]) -> None:
        if len(self.messages) >= self._stuck_at:
            await asyncio.sleep(60)
        self.messages.append(message)


@pytest.mark.parametrize("fails", [False, True])
def test_a_client_that_does_not_take_the_end_is_not_waited_for(fails: bool) -> None:
    client = Client(stuck_at=1)

    async def scenario() -> None:
        await client.reply.begin_stream("max")
        await (client.reply.fail(FAILED) if fails else client.reply.end())

    asyncio.run(scenario())
    assert client.record.is_broken
    assert len(client.messages) == 1


def test_a_whole_answer_has_one_head_and_its_length() -> None:
    client = Client()
    asyncio.run(client.reply.send_whole("max", b"{}"))
    head, body = client.messages
    assert dict(head["headers"])[b"content-length"] == b"2"
    assert (head["status"], body["body"]) == (200, b"{}")
    assert not client.record.is_broken


def test_an_error_has_its_own_status_until_the_head_is_sent() -> None:
    client = Client()
    with pytest.raises(ApiError, match="lost"):
        asyncio.run(client.reply.fail(FAILED))
    assert not client.messages

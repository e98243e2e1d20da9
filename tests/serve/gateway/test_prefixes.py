"""Which engine a request prefers: the one that has the longest part of its prompt, the same for every gateway."""

import json
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chorus.population.manifest import Population
from chorus.serve.gateway.engines import prefixes
from chorus.serve.gateway.engines.engine import Engine
from chorus.serve.gateway.engines.latency import Work
from chorus.serve.gateway.engines.pool import Pool
from chorus.serve.gateway.engines.prefixes import Prefixes
from chorus.serve.gateway.engines.traffic import InFlight
from chorus.serve.gateway.request.call import Call, Kind, read_call
from chorus.serve.gateway.request.prefix import Prefix
from chorus.serve.gateway.request.tiers import default_tier

NUM_ENGINES = 4
SYSTEM = "You are a careful assistant. " * 70
KINDS: list[Kind] = ["completion", "chat", "responses", "messages"]


def text(rng: random.Random, length: int) -> str:
    return "".join(rng.choice("abcdefgh ") for _ in range(length))


def turns(rng: random.Random, count: int, *, system: str = SYSTEM) -> list[list[dict[str, str]]]:
    """The messages of each turn of one conversation."""
    messages, found = [{"role": "system", "content": system}], []
    for _ in range(count):
        messages = [*messages, {"role": "user", "content": text(rng, rng.randint(150, 600))}]
        found.append(messages)
        messages = [*messages, {"role": "assistant", "content": text(rng, rng.randint(150, 600))}]
    return found


def call_of(tiny: Population, messages: list[dict[str, str]], kind: Kind = "chat", **fields: Any) -> Call:
    whole = "".join(each["content"] for each in messages)
    body: dict[str, Any] = {
        "completion": {"prompt": whole},
        "chat": {"messages": messages},
        "responses": {"input": messages},
        "messages": {"system": messages[0]["content"], "messages": messages[1:], "max_tokens": 9},
        "tokens": {"prompt": [ord(each) for each in whole]},
    }[kind]
    return read_call(
        json.dumps({**body, **fields}).encode(), "completion" if kind == "tokens" else kind, tiny, default_tier(tiny)
    )


def key_of(prefixes: Prefixes, call: Call) -> bytes:
    return prefixes.key(call.prefix.hashes(), NUM_ENGINES)


@given(st.text(max_size=5_000), st.text(max_size=5_000))
def test_inputs_that_begin_alike_have_chains_that_begin_alike(begin: str, end: str) -> None:
    short = [link for link, is_complete in Prefix(parts=(begin,)).hashes() if is_complete]
    long = [link for link, _ in Prefix(parts=(begin + end,)).hashes()]
    assert long[: len(short)] == short
    assert len(set(long)) == len(long)


def test_a_chain_is_short_for_a_long_input() -> None:
    assert len(list(Prefix(parts=("x" * 2**22,)).hashes())) < 160


@pytest.mark.parametrize("kind", [*KINDS, "tokens"])
def test_all_turns_of_a_conversation_have_one_key(tiny: Population, kind: Kind) -> None:
    known, rng = Prefixes(), random.Random(1)
    for _ in range(2):  # with a third one, the system prompt would be split
        keys = [key_of(known, call_of(tiny, messages, kind)) for messages in turns(rng, 9)]
        assert len(set(keys)) == 1


@pytest.mark.parametrize("kind", [*KINDS, "tokens"])
def test_a_prefix_of_all_conversations_is_split(tiny: Population, kind: Kind) -> None:
    known, rng = Prefixes(), random.Random(2)
    for _ in range(12):
        for messages in turns(rng, 3):
            key_of(known, call_of(tiny, messages, kind))
    keys = [{key_of(known, call_of(tiny, messages, kind)) for messages in turns(rng, 5)} for _ in range(40)]
    assert sum(len(each) for each in keys) <= 1.2 * len(keys), "a conversation keeps its key"
    assert len(set().union(*keys)) >= len(keys), "and has one of its own"


def test_a_document_with_less_traffic_than_an_engine_is_kept_together(tiny: Population) -> None:
    known, rng = Prefixes(), random.Random(3)
    document, keys = text(rng, 4_000), []
    for idx in range(400):
        if idx % 8 == 0:  # an eighth of the traffic: less than a quarter
            question = [{"role": "user", "content": document}, {"role": "user", "content": text(rng, 200)}]
            keys.append(key_of(known, call_of(tiny, question)))
        else:
            key_of(known, call_of(tiny, turns(rng, 1, system=text(rng, 300))[0]))
    assert len(set(keys)) == 1


def test_gateways_with_other_conversations_choose_the_same_keys(tiny: Population) -> None:
    rng = random.Random(4)
    gateways = Prefixes(), Prefixes()
    for known in gateways:
        for _ in range(12):
            for messages in turns(rng, 3):
                key_of(known, call_of(tiny, messages))
    for messages in (turns(rng, 4)[-1] for _ in range(20)):
        assert len({key_of(known, call_of(tiny, messages)) for known in gateways}) == 1


def test_what_a_client_names_keeps_requests_together_and_apart(tiny: Population) -> None:
    messages = turns(random.Random(5), 1)[0]
    fields: list[dict[str, Any]] = [
        {},
        {"prompt_cache_key": "a"},
        {"prompt_cache_key": "b"},
        {"user": "c"},
        {"cache_salt": "d"},
    ]
    keys = [key_of(Prefixes(), call_of(tiny, messages, **each)) for each in fields]
    assert len(set(keys)) == len(fields)
    other = turns(random.Random(6), 1, system="Another prompt. " * 20)[0]
    assert key_of(Prefixes(), call_of(tiny, other, prompt_cache_key="a")) == keys[1]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_MAX_PREFIXES", 100)
    known, rng = Prefixes(), random.Random(7)
    for _ in range(200):
        known.key(Prefix(parts=(text(rng, 2_000),)).hashes(), NUM_ENGINES)
    assert len(known._nodes) <= 100


def pool_of(num_engines: int) -> Pool:
    pool = Pool()
    session: Any = None
    for idx in range(num_engines):
        engine = Engine(session, url=f"http://e{idx}", is_supervised=False, probe_interval_s=1, probe_timeout_s=1)
        engine.mark_up()
        pool.engines.append(engine)
    return pool


def in_flight(tiny: Population) -> InFlight:
    tier = tiny.tiers[-1]
    work = Work(members=len(tier.members), prompt_tokens=1, max_tokens=9)
    return InFlight(tier=tier, floor=tier, num_sequences=1, work=work, finish_by=None)


def prompts(tiny: Population, count: int) -> list[Call]:
    rng = random.Random(8)
    return [call_of(tiny, [{"role": "user", "content": text(rng, 400)}], "completion") for _ in range(count)]


def test_every_gateway_prefers_the_same_engine_and_all_engines_get_their_share(tiny: Population) -> None:
    one, other = pool_of(4), pool_of(4)
    other.engines.reverse()
    calls = prompts(tiny, 400)
    chosen = [one.candidates(call)[0].url for call in calls]
    assert chosen == [other.candidates(call)[0].url for call in calls]
    assert max(Counter(chosen).values()) <= 1.25 * len(calls) / 4


def test_an_engine_that_goes_moves_only_its_own_requests(tiny: Population) -> None:
    pool, calls = pool_of(5), prompts(tiny, 200)
    before = [pool.candidates(call)[0].url for call in calls]
    gone = pool.engines.pop(2)
    after = [pool.candidates(call)[0].url for call in calls]
    assert all(new == old for new, old in zip(after, before, strict=True) if old != gone.url)


def test_a_busy_engine_is_passed_over_for_the_next_in_line(tiny: Population) -> None:
    pool, (call,) = pool_of(4), prompts(tiny, 1)
    first = pool.candidates(call)[0]
    running = [in_flight(tiny) for _ in range(40)]
    for request in running:
        first.traffic.begin(request)
    second = pool.candidates(call)[0]
    assert second is not first
    assert pool.candidates(call)[0] is second, "not a random one"
    for request in running:
        first.traffic.end(request)
    assert pool.candidates(call)[0] is first

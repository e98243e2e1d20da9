"""What clients see when parts of a cluster die, freeze, come back or are replaced: two real engines, Redis and a gateway.

Every client knows what it should hear, and so notices an answer that is another's.
"""

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.charts.cluster import ENGINES, GATEWAYS, REDIS, Cluster, num_engines_up
from tests.charts.pods import Pod, can_isolate
from tests.live import wait_for

pytestmark = [
    pytest.mark.skipif(not can_isolate(), reason="pods need a mount namespace: run as root"),
    pytest.mark.timeout(900),
]

FINE = "fine"
LOUD = {"error event stream_broken"}
"""How a stream may end whose engine died: nobody takes it for complete."""
BODY: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "model": "tiny:standard"}
PROMPTS = [f"def function_{idx}(value):\n    return" for idx in range(4)]
_PAUSE_S = 0.2
"""Between two requests of a client: engines that start need the processor as well."""


class Traffic:
    """Clients that ask again and again, every second one for a stream, each with a prompt of its own."""

    def __init__(self, url: Callable[[], str], expected: list[str]) -> None:
        self.outcomes: Counter[str] = Counter()
        self._url = url
        self._expected = expected
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(idx,)) for idx in range(len(expected))]

    @contextmanager
    def running(self) -> Iterator["Traffic"]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._ends.set()
            for thread in self._threads:
                thread.join(120)
        assert not any(thread.is_alive() for thread in self._threads), "a client hangs"

    def lasts(self, seconds: float) -> None:
        """Go on for a while, in which something is answered."""
        before = self.outcomes[FINE]
        time.sleep(seconds)
        wait_for("an answer", lambda: self.outcomes[FINE] > before, timeout_s=60)

    def _run(self, idx: int) -> None:
        while not self._ends.is_set():
            self.outcomes[self._ask(idx)] += 1
            self._ends.wait(_PAUSE_S)

    def _ask(self, idx: int) -> str:
        try:
            return answer(self._url(), PROMPTS[idx], self._expected[idx], stream=idx % 2 == 1)
        except httpx.HTTPError as error:
            return type(error).__name__


def answer(url: str, prompt: str | list[str], expected: str, *, stream: bool, **fields: Any) -> str:
    """Ask once; "fine" if the answer is whole and the right one, else what it was."""
    body = {**BODY, "prompt": prompt, "stream": stream, **fields}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        if response.status_code != 200:
            return f"status {response.status_code}"
        if not stream:
            choices = json.loads(response.read())["choices"]
            return FINE if all(choice["text"] == expected for choice in choices) else "another's answer"
        heard: dict[int, str] = {}
        for line in response.iter_lines():
            if line == "data: [DONE]":
                return FINE if set(heard.values()) == {expected} else "another's answer"
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return f"error event {event['error']['code']}"
                for choice in event["choices"]:
                    heard[choice["index"]] = heard.get(choice["index"], "") + choice["text"]
    return "cut off"


@pytest.fixture(scope="module")
def expected(cluster: Cluster) -> list[str]:
    """What each prompt is answered with, asked one by one."""

    def text(prompt: str) -> str:
        body = {**BODY, "prompt": prompt}
        found: str = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["text"]
        return found

    texts = [text(prompt) for prompt in PROMPTS]
    assert len(set(texts)) == len(texts), "prompts with the same answer could not be told apart"
    return texts


@pytest.fixture
def traffic(cluster: Cluster, expected: list[str]) -> Iterator[Traffic]:
    with Traffic(lambda: cluster.url, expected).running() as running:
        yield running


def num_running(pod: Pod) -> float:
    lines = httpx.get(f"http://{pod.address}:8000/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


def test_streams_of_a_killed_engine_break_loudly_and_everything_else_goes_on(
    cluster: Cluster, traffic: Traffic, expected: list[str]
) -> None:
    long_ones: Counter[str] = Counter()
    long_text = httpx.post(
        f"{cluster.url}/v1/completions", json={**BODY, "prompt": PROMPTS[0], "max_tokens": 200}, timeout=60
    ).json()["choices"][0]["text"]

    def ask() -> None:
        long_ones[answer(cluster.url, [PROMPTS[0]] * 32, long_text, stream=True, max_tokens=200)] += 1

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    victim = cluster.pods["engine-1"]
    wait_for(
        "both at work", lambda: all(num_running(cluster.pods[f"engine-{idx}"]) >= 8 for idx in (0, 1)), timeout_s=60
    )
    cluster.network.remove(ENGINES, victim.address)
    victim.die()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a stream hangs"
    assert long_ones[FINE] >= 1, f"those of the other engine go on: {long_ones}"
    assert long_ones.keys() - {FINE} == LOUD, long_ones
    traffic.lasts(3)
    # Whole answers are asked for again on the other engine; only what had begun to stream is lost, and says so.
    assert set(traffic.outcomes) <= {FINE} | LOUD, traffic.outcomes

    cluster.start_engine("engine-1")
    wait_for("both engines", lambda: num_engines_up(cluster.url) == 2, timeout_s=30)
    traffic.lasts(2)
    assert set(traffic.outcomes) <= {FINE} | LOUD, traffic.outcomes


def test_a_frozen_engine_is_left_until_it_wakes(cluster: Cluster, traffic: Traffic) -> None:
    victim = cluster.pods["engine-0"]
    victim.signal(signal.SIGSTOP)
    try:
        wait_for("it is given up", lambda: num_engines_up(cluster.url) == 1, timeout_s=60)
        traffic.lasts(3)
    finally:
        victim.signal(signal.SIGCONT)
    wait_for("it is back", lambda: num_engines_up(cluster.url) == 2, timeout_s=60)
    traffic.lasts(3)
    assert set(traffic.outcomes) <= {FINE} | LOUD, traffic.outcomes


def test_without_redis_everything_goes_on_and_heals(cluster: Cluster, traffic: Traffic) -> None:
    def sees_redis() -> bool:
        return "chorus_gateway_redis_up 1.0" in httpx.get(f"{cluster.url}/metrics").text

    assert sees_redis()
    cluster.take_out(REDIS, "redis").die()
    wait_for("its loss is seen", lambda: not sees_redis(), timeout_s=30)
    traffic.lasts(3)
    cluster.start_behind(REDIS, "redis", "Deployment", "redis")
    wait_for("it is seen again", sees_redis, timeout_s=60)
    traffic.lasts(2)
    assert set(traffic.outcomes) == {FINE}, traffic.outcomes


def test_a_client_that_reads_slowly_delays_nobody_and_loses_nothing(cluster: Cluster, traffic: Traffic) -> None:
    body = {**BODY, "prompt": [PROMPTS[0]] * 64, "max_tokens": 200, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as slow:
        assert slow.status_code == 200
        parts = slow.iter_bytes()
        heard = [next(parts)]
        traffic.lasts(8)
        heard.extend(parts)
    events = b"".join(heard).split(b"\n\n")
    assert events[-2:] == [b"data: [DONE]", b""]
    ended = [json.loads(event.removeprefix(b"data: "))["choices"] for event in events[:-2]]
    reasons = {each["index"]: each["finish_reason"] for choices in ended for each in choices if each["finish_reason"]}
    assert reasons == dict.fromkeys(range(64), "length")
    assert set(traffic.outcomes) == {FINE}, traffic.outcomes


def test_a_rolling_restart_in_the_rendered_order_loses_no_request(cluster: Cluster, traffic: Traffic) -> None:
    # A StatefulSet replaces its pods from the last to the first, each when the one before is ready.
    for name in ("engine-1", "engine-0"):
        assert cluster.take_out(ENGINES, name).terminate() in (0, -signal.SIGTERM)
        cluster.start_engine(name)
        wait_for("both engines", lambda: num_engines_up(cluster.url) == 2, timeout_s=30)
        traffic.lasts(2)
    # A Deployment without unavailable pods starts the new one first.
    old = cluster.pods["gateway-0"]
    new = cluster.start("gateway-1", "Deployment", "gateway")
    new.wait_until_ready()
    wait_for("both engines", lambda: num_engines_up(f"http://{new.address}:8000") == 2, timeout_s=30)
    cluster.network.add(GATEWAYS, new.address)
    cluster.network.remove(GATEWAYS, old.address)
    assert old.terminate() == 0
    traffic.lasts(2)
    assert set(traffic.outcomes) == {FINE}, traffic.outcomes
    assert traffic.outcomes.total() > 100

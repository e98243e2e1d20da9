"""API keys: who gets in, to what, how much of it; and that no key is ever seen again."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import pytest

from chorus.population.errors import ChorusError
from chorus.population.manifest import Population
from chorus.serve.gateway.request.keys import Keys
from tests.live import wait_for
from tests.serve.gateway.conftest import Pair, gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, WHOLE, ScriptedEngine, event

ALICE, BOB = "ck-alice-8f3b1c52e7", "ck-bob-11d0a9c37b"


def entry(name: str, key: str, **rights: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **rights}


def text(*entries: dict[str, Any]) -> str:
    return json.dumps({"keys": entries})


def post(pair: Pair, key: str | None = ALICE, **fields: Any) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.post(f"{pair.url}/v1/completions", json={"prompt": "a", **fields}, headers=headers, timeout=20)


def guarded(tiny: Population, *entries: dict[str, Any]) -> Any:
    engine = ScriptedEngine([WHOLE])
    engine.content_type = "application/json"
    return gateway_before(engine, tiny, keys=Keys(text=text(*entries)))


def test_without_a_known_key_nothing_is_served_and_nothing_reaches_the_engine(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE)) as pair:
        for key, code in ((None, "missing_api_key"), ("wrong", "invalid_api_key"), ("Basic x", "invalid_api_key")):
            refused = post(pair, key)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, code)
            assert refused.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/models/tiny"):
            assert httpx.get(pair.url + path).status_code == 401
        for path in ("/tokenize", "/v1/chat/completions"):
            assert httpx.post(pair.url + path, content=b"no JSON").status_code == 401
        assert not pair.engine.bodies
        assert post(pair).status_code == 200
        assert "authorization" not in pair.engine.headers[-1]
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert httpx.get(pair.url + path).status_code == 200


def test_a_key_opens_its_own_tiers_only(tiny: Population) -> None:
    rights = entry("alice", ALICE, tiers=["economy", "standard"])
    with guarded(tiny, rights, entry("bob", BOB)) as pair:
        assert post(pair).json()["population"]["tier"] == "standard"
        assert post(pair, budget=4).json()["population"]["tier"] == "standard"
        for fields in ({"budget": "max"}, {"model": "tiny:max"}, {"min_budget": "max"}):
            refused = post(pair, **fields)
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "tier_not_allowed")
        assert post(pair, budget="gold").status_code == 404
        assert post(pair, BOB, budget="max").json()["population"]["tier"] == "max"
        listed = httpx.get(f"{pair.url}/v1/models", headers={"Authorization": f"Bearer {ALICE}"}).json()["data"]
        assert [card["id"] for card in listed] == ["tiny", "tiny:economy", "tiny:standard"]
        assert httpx.get(
            f"{pair.url}/v1/models/tiny:max", headers={"Authorization": f"Bearer {ALICE}"}
        ).status_code == 404  # fmt: skip


def test_a_rate_of_requests_is_kept_and_says_when_to_come_back(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, requests_per_s=0.5), entry("bob", BOB)) as pair:
        assert post(pair).status_code == 200
        refused = post(pair)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 2
        assert post(pair, BOB).status_code == 200
        wait_for("the next turn", lambda: post(pair).status_code == 200, timeout_s=10)


def test_tokens_are_charged_as_asked_and_settled_as_used(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, tokens_per_min=100)) as pair:
        for _ in range(5):  # 50 asked and 7 used, each time
            assert post(pair, max_tokens=50).status_code == 200
        refused = post(pair, max_tokens=90)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 40
        pair.engine.steps, pair.engine.content_type = [event("a"), USAGE, DONE], "text/event-stream"
        assert post(pair, max_tokens=40, stream=True).status_code == 200
        used = 'chorus_gateway_tenant_tokens_total{tenant="alice"} 42.0'
        assert used in httpx.get(f"{pair.url}/metrics").text


def test_what_the_engine_refuses_costs_nothing(tiny: Population) -> None:
    with guarded(tiny, entry("alice", ALICE, tokens_per_min=100)) as pair:
        pair.engine.status = 400
        for _ in range(5):
            assert post(pair, max_tokens=90).status_code == 400


def test_keys_change_while_the_gateway_runs_and_a_broken_file_changes_nothing(
    tiny: Population, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text(entry("alice", ALICE)))
    engine = ScriptedEngine([WHOLE])
    engine.content_type = "application/json"
    with gateway_before(engine, tiny, keys=Keys(path=file)) as pair:
        assert post(pair).status_code == 200
        replacement = tmp_path / "new.json"
        replacement.write_text(text(entry("bob", BOB)))
        replacement.replace(file)
        assert (post(pair, ALICE).status_code, post(pair, BOB).status_code) == (401, 200)
        file.write_text('{"keys": [{"name": "eve", "sha256": "ck-not-a-digest"}]}')
        assert (post(pair, ALICE).status_code, post(pair, BOB).status_code) == (401, 200)
        file.unlink()
        assert post(pair, BOB).status_code == 200
        assert "ck-not-a-digest" not in caplog.text


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{}",
        text(entry("a b", ALICE)),
        text(entry("a", ALICE), entry("a", BOB)),
        text(entry("a", ALICE), entry("b", ALICE)),
        text(entry("a", ALICE, tiers=[])),
        text(entry("a", ALICE, requests_per_s=0)),
        text(entry("a", ALICE, unknown=1)),
        text({"name": "a", "sha256": ALICE}),
    ],
)
def test_keys_that_make_no_sense_are_refused_at_start_without_showing_them(broken: str) -> None:
    with pytest.raises(ChorusError) as error:
        Keys(text=broken)
    assert ALICE not in str(error.value)


def test_no_key_is_logged_or_measured(tiny: Population, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG), guarded(tiny, entry("alice", ALICE)) as pair:
        post(pair)
        post(pair, "ck-somebody-elses")
        post(pair, model="nothing")
        shown = caplog.text + httpx.get(f"{pair.url}/metrics").text + httpx.get(f"{pair.url}/openapi.json").text
    assert ALICE not in shown
    assert "ck-somebody-elses" not in shown
    assert hashlib.sha256(ALICE.encode()).hexdigest() not in shown


def test_a_byte_order_mark_is_no_part_of_the_keys_and_another_encoding_a_sentence(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for written in (text(entry("alice", ALICE)).encode("utf-8-sig"), text(entry("alice", ALICE)).encode()):
        file.write_bytes(written)
        assert Keys(path=file).tenant(f"Bearer {ALICE}").name == "alice"
    file.write_bytes(text(entry("alice", ALICE)).encode("utf-16"))
    with pytest.raises(ChorusError, match=r"not UTF-8\. Save it as UTF-8"):
        Keys(path=file)

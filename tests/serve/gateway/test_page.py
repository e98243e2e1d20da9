"""The page at `/` in a real browser: headless Chromium, driven over its debugging protocol."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from chorus.population.manifest import Population
from chorus.serve.gateway.request.keys import Keys
from tests.live import wait_for
from tests.serve.gateway.conftest import gateway_before
from tests.serve.gateway.scripted import DONE, USAGE, ScriptedEngine, event
from tests.serve.gateway.test_keys import ALICE, entry, text


@contextmanager
def chromium(profile: Path) -> Iterator[str]:
    """A browser; yields the address of its debugging protocol."""
    program = shutil.which("chromium")
    assert program, "chromium is missing: `make test` installs it, or apt-get install chromium"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
    command = [program, *flags, "--window-size=1000,900", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port_file = profile / "DevToolsActivePort"
        wait_for("the browser", lambda: port_file.exists() and port_file.read_text().count("\n"), timeout_s=60)
        yield f"http://127.0.0.1:{port_file.read_text().splitlines()[0]}"
    finally:
        process.terminate()
        process.wait(20)


class Page:
    """One tab."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        self.problems: list[str] = []
        """What the browser complained about."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        while True:
            message = json.loads((await self._socket.receive(60)).data)
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded", "Network.loadingFailed"):
                self.problems.append(json.dumps(message["params"])[:500])
            if message.get("id") == self._count:
                assert "error" not in message, message
                result = message["result"]
                assert isinstance(result, dict)
                return result

    async def evaluate(self, script: str) -> Any:
        found = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script: str) -> Any:
        for _ in range(600):
            if found := await self.evaluate(script):
                return found
            await asyncio.sleep(0.05)
        raise TimeoutError(f"{script}: {self.problems}, {await self.evaluate('document.body.innerText')}")


def in_browser(url: str, profile: Path, scenario: Any, *, ready: str = "document.getElementById('tier')") -> None:
    """Open `url` and let `scenario` act on the page, once it is loaded and `ready` is there."""

    async def run(address: str) -> None:
        target = httpx.put(f"{address}/json/new?about:blank", timeout=30).json()["webSocketDebuggerUrl"]
        async with aiohttp.ClientSession() as session, session.ws_connect(target, max_msg_size=0) as socket:
            page = Page(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await page.call(f"{domain}.enable")
            await page.call("Page.navigate", url=url)
            await page.until(f"document.readyState === 'complete' && {ready} !== null")
            await scenario(page)
            assert not page.problems

    with chromium(profile) as address:
        asyncio.run(run(address))


def token(word: str, logprob: float, finish: str | None = None) -> bytes:
    logprobs = {"tokens": [word], "token_logprobs": [logprob], "top_logprobs": None, "text_offset": [0]}
    ids = {"token_ids": [7], "prompt_token_ids": [1, 2]}
    return event("", choices=[{"index": 0, "text": word, "logprobs": logprobs, "finish_reason": finish, **ids}])


def test_the_page_streams_an_answer_tinted_by_disagreement_with_its_members_and_deadline(
    tiny: Population, tmp_path: Path
) -> None:
    words = [token("def", -0.01), 0.05, token(" <b>", -2.0), 0.05, token(" x", -9.0, "length"), USAGE, DONE]
    with gateway_before(ScriptedEngine(words), tiny, keys=Keys(text=text(entry("alice", ALICE)))) as pair:
        # They agree about the prompt's second token and the first of the answer, then less and less.
        pair.engine.member_logprobs = {"t0-c00": [-1.0, -0.5, -2.0, -9.0], "t0-c01": [-1.0, -0.5, -1.0, -1.0]}

        async def scenario(page: Page) -> None:
            await page.until("document.getElementById('offer').textContent.includes('API key')")
            assert "401" in page.problems[0]  # the browser shows every refusal; it is the one that was expected
            page.problems.clear()
            await page.evaluate(f"key.value = '{ALICE}'; key.dispatchEvent(new Event('change'))")
            await page.until("tier.options.length === 4")
            assert "standard (2 members)" in await page.evaluate("[...tier.options].map(o => o.text).join()")
            await page.evaluate(
                "tier.value = 'standard'; budget.value = 60000; document.getElementById('send').click()"
            )
            await page.until("state.textContent.startsWith('done')")
            shown = await page.evaluate("[...document.querySelectorAll('.token')].map(t => [t.textContent, t.title])")
            assert [each[0] for each in shown] == ["def", " <b>", " x"]
            assert shown[0][1] == "probability 0.990; members: t0-c00 0.61, t0-c01 0.61; disagreement 0.000 nats"
            alphas = await page.evaluate(
                "[...document.querySelectorAll('.token')].map(t => Number(t.style.backgroundColor.match(/([\\d.]+)\\)$/)[1]))"
            )
            assert alphas[0] == 0
            assert 0 < alphas[1] < alphas[2] == pytest.approx(0.7)
            assert "disagreed" in await page.evaluate("document.getElementById('legend').textContent")
            assert await page.evaluate("state.textContent") == "done: 3 tokens, length"
            assert (await page.evaluate("deadline.textContent")).startswith("met")
            assert await page.evaluate("served.textContent") == "standard"
            assert float(await page.evaluate("speed.textContent")) > 0
            assert await page.evaluate("members.innerText.includes('t0-c01')")

        in_browser(pair.url, tmp_path / "profile", scenario)
        sent, *alone = [body for body in pair.engine.bodies if "prompt" in body]
        assert [body["vllm_xargs"] for body in alone] == [{"chorus_member": "t0-c00"}, {"chorus_member": "t0-c01"}]
        assert alone[0]["prompt"] == [1, 2, 7, 7]
        assert sent["vllm_xargs"]["chorus_tier"] == "standard"
        assert "chorus_time_budget_ms" in sent["vllm_xargs"]


def test_the_page_needs_nothing_from_outside_and_lets_nothing_in(tiny: Population) -> None:
    files = {"": "text/html", "docs": "text/html", "page/page.css": "text/css"}
    files |= {"page/page.js": "text/javascript", "page/docs.js": "text/javascript"}
    with gateway_before(ScriptedEngine(), tiny) as pair:
        for path, kind in files.items():
            answer = httpx.get(f"{pair.url}/{path}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert "default-src 'self'" in policy
            assert "unsafe" not in policy
            assert "http://" not in answer.text
            assert "https://" not in answer.text
        assert "/page/page.js" not in httpx.get(f"{pair.url}/openapi.json").text
        assert httpx.get(f"{pair.url}/redoc").status_code == 404


def test_the_documentation_lists_every_route_with_its_fields(tiny: Population, tmp_path: Path) -> None:
    with gateway_before(ScriptedEngine(), tiny) as pair:
        paths = set(httpx.get(f"{pair.url}/openapi.json").json()["paths"])

        async def scenario(page: Page) -> None:
            await page.until("document.querySelectorAll('details').length > 5")
            shown = await page.evaluate("[...document.querySelectorAll('summary code')].map(each => each.textContent)")
            assert set(shown) == paths
            fields = (
                "[...document.querySelectorAll('details:first-of-type td:first-child')].map(each => each.textContent)"
            )
            assert {"prompt", "budget", "max_tokens", "200", "429"} <= set(await page.evaluate(fields))
            assert "chorus: tiny" in await page.evaluate("document.body.textContent")

        in_browser(f"{pair.url}/docs", tmp_path / "profile", scenario, ready="document.getElementById('routes')")

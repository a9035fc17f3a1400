"""The page and the engine's snapshots over HTTP: what is served, to whom, and what watchers cost."""

import asyncio
import contextlib
import json
import re
import socket
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import httpx
import pytest
from openai_calls import GREEDY, LOCAL, complete, error_of

import gcompute
from gcompute.serve.api import create_app
from gcompute.serve.page.document import SCRIPTS, STYLES, document, source_of
from gcompute.serve.request import NotReady
from gcompute.serve.server import background
from gcompute.serve.watchers import MAX_WATCHERS, Watchers

REPOSITORY = Path(gcompute.__file__).parent.parent
WATCH_HEAD = b"GET /engine/events HTTP/1.1\r\nHost: localhost\r\n\r\n"


@contextlib.contextmanager
def snapshots(http):
    with http.stream("GET", "/engine/events") as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield (json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line)


def test_the_page_is_one_document_that_names_no_other_place(http):
    response = http.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert http.head("/").headers["content-length"] == str(len(response.content))
    text = response.text
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+[^\s\"'`]*", re.sub(r"^\s*//.*$", "", text, flags=re.M)))
    # The name of a vocabulary, which nothing fetches.
    assert urls == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|script|img|iframe|source|object)[^>]*\s(src|href)=[\"'](?!data:)", text)
    assert not re.search(r"@import|url\((?!data:)", text)


def test_the_policy_lets_only_the_pages_own_style_and_script_run(http):
    response = http.get("/")
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    style, script = (re.search(rf"<{tag}>(.*?)</{tag}>", response.text, re.S) for tag in ("style", "script"))
    assert style is not None
    assert script is not None
    assert rules["style-src"] == source_of(style[1])
    assert rules["script-src"] == source_of(script[1])
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    assert "unsafe" not in response.headers["content-security-policy"]
    assert len(re.findall(r"<(?:style|script)\b", response.text)) == 2
    assert not re.search(r"<[^>]+\s(style|on\w+)=", response.text.replace(style[1], "").replace(script[1], ""))
    assert response.headers["x-content-type-options"] == "nosniff"


def test_scripts_never_make_html_of_text():
    text = document().body.decode()
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "DOMParser"):
        assert way not in text


def test_every_element_that_scripts_name_is_there():
    text = document().body.decode()
    ids = re.findall(r"\bid=\"([\w-]+)\"", text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\$\(\"([\w-]+)\"\)", text)) <= set(ids)


@pytest.mark.oldest
def test_a_snapshot_has_numbers_and_no_text(http, engine):
    told = complete(http, prompt="once upon", **GREEDY)["choices"][0]["text"]
    response = http.get("/engine")
    assert response.headers["cache-control"] == "no-store"
    seen = response.json()
    assert "once upon" not in response.text
    assert told not in response.text
    assert seen["about"] == {"model": "tiny", "max_context": 64, "max_choices": 7, "chat": False}
    assert seen["status"] == "ready"
    assert seen["slots"] == {"num": 3, "running": []}
    pages = seen["pages"]
    assert pages["free"] + pages["cached"] + pages["used"] == pages["num"] > 0
    assert seen["totals"]["num_output_tokens"] == engine.stats().num_output_tokens > 0
    assert seen["recent"]["first_token_s"]["p50"] > 0
    decode = seen["decode"]
    assert decode["batch"] == 1
    assert decode["measured"]["tokens_per_s"] == pytest.approx(1 / decode["measured"]["step_s"])
    assert decode["predicted"]["bound"] == "memory"
    assert seen["roofline"]["critical_batch"] > 200


@pytest.mark.oldest
def test_events_follow_a_request_into_its_slot_and_out(http, url, gate):
    sent = threading.Thread(target=lambda: httpx.post(f"{url}/v1/completions", json={"prompt": "abc", **GREEDY}))
    with snapshots(http) as seen:
        assert next(seen)["slots"]["running"] == []
        sent.start()
        assert gate.reached.wait(30)
        held = next(one for one in seen if one["slots"]["running"])
        (slot,) = held["slots"]["running"]
        assert (slot["phase"], slot["num_prompt"], slot["max_tokens"]) == ("decode", 3, 12)
        assert 0 <= slot["slot"] < 3
        assert held["num_running"] == 1
        assert held["pages"]["used"] >= 1
        gate.open.set()
        freed = next(one for one in seen if not one["slots"]["running"])
        assert freed["pages"]["used"] == 0
        assert freed["totals"]["num_finished"] > held["totals"]["num_finished"]
    sent.join()


def test_with_a_key_the_page_is_open_and_snapshots_are_not(engine):
    with (
        background(engine, LOCAL, model_name="tiny", api_key="secret") as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        assert http.get("/").status_code == http.get("/health").status_code == http.get("/metrics").status_code == 200
        for path in ("/engine", "/engine/events"):
            error_of(http.get(path), 401, code="invalid_api_key")
        headers = {"Authorization": "Bearer secret"}
        assert http.get("/engine", headers=headers).json()["roofline"] is None
        with http.stream("GET", "/engine/events", headers=headers) as response:
            assert response.status_code == 200


def test_a_server_that_ends_does_not_wait_for_watchers(engine):
    with httpx.Client(trust_env=False, timeout=60) as http, contextlib.ExitStack() as stack:
        with background(engine, LOCAL, model_name="tiny") as url:
            watcher = stack.enter_context(httpx.Client(base_url=url, trust_env=False, timeout=60))
            seen = stack.enter_context(snapshots(watcher))
            next(seen)
        assert len(list(seen)) < 100
        with pytest.raises(httpx.HTTPError):
            http.get(f"{url}/health")


class Looks:
    """Counts snapshots, which are numbered."""

    def __init__(self, size: int = 0):
        self.num, self.size = 0, size

    def __call__(self) -> bytes:
        self.num += 1
        return b"%d" % self.num + b"." * self.size


def test_watchers_share_one_clock_which_stops_with_the_last():
    async def watch() -> None:
        looks = Looks()
        watchers = Watchers(looks, period_s=0.01)
        streams = [watchers.snapshots() for _ in range(20)]
        for stream in streams:
            await anext(stream)
        for _ in range(5):
            taken = [await anext(stream) for stream in streams]
        assert watchers.num == 20
        assert looks.num < 20
        assert max(map(int, taken)) - min(map(int, taken)) <= 1
        for stream in streams:
            await stream.aclose()
        assert watchers.num == 0
        before = looks.num
        await asyncio.sleep(0.05)
        assert looks.num == before

    asyncio.run(watch())


def test_a_slow_watcher_misses_snapshots_and_gets_the_newest():
    async def watch() -> None:
        looks = Looks()
        stream = Watchers(looks, period_s=0.005).snapshots()
        first = int(await anext(stream))
        while looks.num < first + 10:
            await asyncio.sleep(0.005)
        assert int(await anext(stream)) >= first + 10
        await stream.aclose()

    asyncio.run(watch())


def test_a_snapshot_that_fails_ends_no_stream(caplog):
    calls = iter([b"1", ValueError("no"), b"3"])

    def look() -> bytes:
        value = next(calls, b"4")
        if isinstance(value, Exception):
            raise value
        return value

    async def watch() -> list[bytes]:
        stream = Watchers(look, period_s=0.001).snapshots()
        seen = [await anext(stream) for _ in range(8)]
        await stream.aclose()
        return seen

    assert b"4" in asyncio.run(watch())
    assert "no snapshot could be made" in caplog.text


def test_closing_ends_streams_and_refuses_new_ones():
    async def watch() -> None:
        watchers = Watchers(Looks(), period_s=3600)
        stream = watchers.snapshots()
        assert await anext(stream) == b"1"
        waiting = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        watchers.close()
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert watchers.num == 0
        with pytest.raises(NotReady):
            watchers.response()

    asyncio.run(watch())


async def _answer(app, receive, send) -> None:
    scope = {"type": "http", "method": "GET", "path": "/engine/events", "query_string": b"", "headers": []}
    await app({**scope, "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http"}, receive, send)


def test_one_that_reads_nothing_is_dropped(engine, monkeypatch):
    monkeypatch.setattr("gcompute.serve.watchers.STUCK_S", 0.05)
    app = create_app(engine, model_name="tiny")

    async def watch() -> None:
        async def receive():
            await asyncio.Event().wait()

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        await asyncio.wait_for(_answer(app, receive, send), 30)

    asyncio.run(watch())
    assert app.state.watchers.num == 0


def test_watchers_are_limited_and_a_gone_one_makes_room(http, url):
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(MAX_WATCHERS)]
        for sock in socks:
            sock.sendall(WATCH_HEAD)
        for sock in socks:
            assert sock.recv(64).startswith(b"HTTP/1.1 200")
        refused = http.get("/engine/events")
        assert "at most 32" in error_of(refused, 429, code="too_many_watchers")
        assert refused.headers["retry-after"] == "1"
        # One snapshot and the API are still to be had.
        assert http.get("/engine").status_code == 200
        complete(http, prompt="a", **GREEDY)
        socks[0].close()
        for _ in range(200):
            with http.stream("GET", "/engine/events") as response:
                if response.status_code == 200:
                    break
        else:
            raise AssertionError("the place of a watcher that left was not given up")


@pytest.mark.slow
def test_the_wheel_has_the_page_and_not_its_picture(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    sent = {f"gcompute/serve/page/{name}" for name in ("index.html", *STYLES, *SCRIPTS)}
    assert sent <= set(names)
    assert [name for name in names if name.endswith(".png")] == []

"""Fuzzed bodies, clients that leave, overload, forced failures, SIGTERM: no 500, no slot lost, no neighbour harmed."""

import gc
import json
import logging
import random
import socket
import struct
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest
from openai_calls import GREEDY, chunks_of, complete, metric

import gcompute.serve.engine as engine_module
from gcompute.model.tokenizer import StreamDecoder
from gcompute.serve import chat, protocol
from gcompute.serve.request import QueueFull, Request, Sampling

PATHS = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(autouse=True)
def books(engine, checked_books):
    """No slot and no page is lost or held twice, whatever is done to the engine."""
    with checked_books(engine):
        yield


def check_all_free(engine, wait_until) -> None:
    wait_until(engine, lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    stats = engine.stats()
    assert (stats.status, stats.num_cells_used, stats.num_late_compilations) == ("ready", 0, 0)
    assert stats.num_pages == stats.num_pages_free + stats.num_pages_cached
    assert engine._scheduler.num_free_slots == stats.slots
    assert not engine._outputs


# Fuzz ----------------------------------------------------------------------------------------------------------------

TEXTS = ("", "a", "\u0000", "\ud800", "😀" * 5, "e\u0301\u202e", "\uffff", "<|endoftext|>", "\n", "x" * 80, "NaN", "1")
NUMBERS = (0, 1, -1, 2, 3, 7, 64, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320, 1.5)
# Written into the JSON as they are.
DEEP = ("[" * 2000 + "]" * 2000, '{"a":' * 500 + "1" + "}" * 500)
RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, *DEEP)


def random_value(rng: random.Random, depth: int = 0):
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind < 2:
        return rng.choice(NUMBERS)
    if kind < 4:
        return rng.choice(TEXTS)
    if kind < 6:
        return rng.choice((None, True, False, [], {}))
    if kind < 8:
        return [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice((*TEXTS, "type", "text", "5")): random_value(rng, depth + 1) for _ in range(rng.randrange(4))}


def valid_body(rng: random.Random, path: str) -> dict:
    body: dict = {"max_tokens": rng.randrange(1, 9), "stream": rng.random() < 0.3}
    settings = {
        "model": "tiny",
        "temperature": rng.choice((0, 0.7, 1e-9, 1e6)),
        "top_k": rng.choice((-1, 0, 5)),
        "top_p": rng.random(),
        "min_p": rng.random(),
        "seed": rng.randrange(-(2**63), 2**64),
        "n": rng.choice((1, 2, 3)),
        "stop": rng.choice(("a", ["b", "\u2603"], None)),
        "stop_token_ids": [rng.randrange(257)],
        "min_tokens": rng.choice((0, 1)),
        "presence_penalty": rng.uniform(-2, 2),
        "frequency_penalty": rng.uniform(-2, 2),
        "repetition_penalty": rng.uniform(0.01, 3),
        "logit_bias": {str(rng.randrange(257)): rng.uniform(-100, 100)},
        "ignore_eos": rng.random() < 0.5,
        "user": rng.choice(TEXTS),
        "logprobs": rng.random() < 0.5 if path.endswith("chat/completions") else rng.randrange(21),
    }
    body |= {name: settings[name] for name in rng.sample(sorted(settings), rng.randrange(6))}
    if path.endswith("chat/completions"):
        num = rng.randrange(1, 3)
        turns = [{"role": rng.choice(chat.ROLES), "content": rng.choice(TEXTS[:8])} for _ in range(num)]
        return {**body, "messages": turns}
    prompts = (rng.choice(TEXTS), [rng.randrange(257) for _ in range(rng.randrange(1, 9))], [rng.choice(TEXTS), "b"])
    return {**body, "prompt": rng.choice(prompts)}


def random_body(rng: random.Random, path: str) -> bytes:
    """A valid body, most often damaged: fields of another type, missing or added, raw text, bytes cut and flipped."""
    body = valid_body(rng, path)
    legal = [*chat.KNOWN, *protocol.KNOWN, *chat.NEUTRAL, *protocol.NEUTRAL, "", "\ud800", "x" * 999]
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        kind = rng.randrange(4)
        if kind == 0:
            body.pop(rng.choice(sorted(body)), None)
        else:
            body[rng.choice([*sorted(body), rng.choice(legal)])] = random_value(rng)
        if not body:
            break
    text = json.dumps(body)
    if rng.random() < 0.15:
        text = text.replace(rng.choice(("1", "null", "true", "[]", '"a"')), rng.choice(RAW), 1)
    content = bytearray(text.encode())
    damage = rng.random()
    if damage < 0.05:
        del content[rng.randrange(len(content)) :]
    elif damage < 0.1:
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif damage < 0.12:
        content = bytearray(rng.randbytes(rng.randrange(50)))
    return bytes(content)


def fuzz(http, engine, wait_until, *, seed: int, num: int) -> dict[int, int]:
    rng = random.Random(seed)
    good = complete(http, prompt="good", **GREEDY)["choices"]
    statuses: dict[int, int] = {}
    for _ in range(num):
        path = rng.choice(PATHS)
        content = random_body(rng, path)
        response = http.post(path, content=content)
        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
        assert response.status_code in (200, 400, 404), (content, response.text)
        if response.status_code != 200:
            error = response.json()["error"]
            assert list(error) == ["message", "type", "param", "code"], content
            assert error["message"], content
            assert error["message"].encode(), "half a surrogate pair is no UTF-8"
            assert len(error["message"]) < 500, content
        elif response.headers["content-type"].startswith("text/event-stream"):
            assert chunks_of(response.text)[-1] == "[DONE]", content
        else:
            assert response.json()["choices"], content
    assert complete(http, prompt="good", **GREEDY)["choices"] == good
    check_all_free(engine, wait_until)
    return statuses


def test_fuzzed_bodies_are_served_or_refused(http, engine, wait_until):
    statuses = fuzz(http, engine, wait_until, seed=0, num=300)
    assert min(statuses.get(200, 0), statuses.get(400, 0)) > 50, f"one-sided bodies test little: {statuses}"


@pytest.mark.slow
def test_ten_thousand_fuzzed_bodies(http, engine, wait_until):
    statuses = fuzz(http, engine, wait_until, seed=1, num=10_000)
    assert min(statuses[200], statuses[400]) > 1000


# Clients and neighbours ----------------------------------------------------------------------------------------------


def leave_early(url: str, rng: random.Random) -> None:
    """Ask for a stream and close the connection after some bytes, politely or by a reset."""
    body = {"prompt": "a", "max_tokens": 50, "ignore_eos": True, "stream": rng.random() < 0.8, "n": rng.choice((1, 2))}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as leaving:
        whole = head + content
        leaving.sendall(whole if rng.random() < 0.9 else whole[: rng.randrange(len(whole))])
        leaving.settimeout(0.05)
        for _ in range(rng.randrange(4)):
            try:
                leaving.recv(300)
            except TimeoutError:
                break
        if rng.random() < 0.5:
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def complete_when_there_is_room(http, **body) -> str:
    while True:
        response = http.post("/v1/completions", json=body)
        if response.status_code != 429:
            assert response.status_code == 200, response.text
            return response.json()["choices"][0]["text"]


def test_two_hundred_clients_that_leave_lose_no_slot_and_harm_nobody(http, url, engine, wait_until):
    expected = complete(http, prompt="stays", **GREEDY)["choices"][0]["text"]
    cancelled = 'gcompute_requests_total{reason="cancelled"}'
    before = metric(http, cancelled) if cancelled in http.get("/metrics").text else 0
    with ThreadPoolExecutor(8) as pool:
        leaving = [pool.submit(leave_early, url, random.Random(seed)) for seed in range(200)]
        with ThreadPoolExecutor(2) as staying:
            texts = [staying.submit(complete_when_there_is_room, http, prompt="stays", **GREEDY) for _ in range(10)]
            assert {text.result() for text in texts} == {expected}
        for one in leaving:
            one.result()
    check_all_free(engine, wait_until)
    assert metric(http, cancelled) > before + 20, "too few were cut off for this to test anything"
    assert complete(http, prompt="stays", **GREEDY)["choices"][0]["text"] == expected


def test_clients_that_do_not_read_hold_no_slot(http, url, engine, wait_until):
    content = json.dumps({"prompt": "a", "max_tokens": 60, "ignore_eos": True, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    host, port = url.removeprefix("http://").split(":")
    slow = [socket.create_connection((host, int(port)), timeout=30) for _ in range(5)]
    try:
        for one in slow:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            one.sendall(head + content)
        for one in slow:
            assert one.recv(1)
        check_all_free(engine, wait_until)
        assert complete(http, prompt="b", **GREEDY)["usage"]["completion_tokens"] == 12
    finally:
        for one in slow:
            one.close()


def test_overload_at_ten_times_capacity_is_429s_and_the_accepted_finish(http, engine, wait_until):
    # 3 slots and 4 places in the queue.
    expected = complete(http, prompt="a", **GREEDY)["choices"][0]["text"]
    start = threading.Barrier(70)

    def ask() -> tuple[int, str]:
        start.wait(30)
        response = http.post("/v1/completions", json={"prompt": "a", **GREEDY})
        if response.status_code == 429:
            assert int(response.headers["Retry-After"]) >= 1
            return 429, ""
        return response.status_code, response.json()["choices"][0]["text"]

    with ThreadPoolExecutor(70) as pool:
        answers = [future.result() for future in [pool.submit(ask) for _ in range(70)]]
    assert {status for status, _ in answers} == {200, 429}
    assert {text for status, text in answers if status == 200} == {expected}
    check_all_free(engine, wait_until)


def memory_grown_by(engine, wait_until, overload, *, num_rounds: int) -> int:
    """Bytes that Python holds more after rounds of overload, once as many before them have filled what is reused."""

    def measure() -> int:
        check_all_free(engine, wait_until)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        for _ in range(num_rounds):
            overload()
        before = measure()
        for _ in range(num_rounds):
            overload()
        return measure() - before
    finally:
        tracemalloc.stop()


def test_overload_leaves_nothing_in_memory(engine, wait_until):
    def overload() -> None:
        streams = []
        for _ in range(70):
            try:
                streams.append(engine.submit(Request(prompt=(1,), sampling=Sampling(max_tokens=2, ignore_eos=True))))
            except QueueFull:
                continue
        assert 7 <= len(streams) < 70
        assert {stream.result().reason for stream in streams} == {"length"}

    # Seven streams a round are accepted; one that somebody kept would be some 3000 bytes with its events.
    assert memory_grown_by(engine, wait_until, overload, num_rounds=8) < 8 * 7 * 1000


@pytest.mark.slow
def test_overload_over_http_leaves_nothing_in_memory(http, engine, wait_until):
    body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True}
    # Shared by 70 threads, the client at times closes a kept connection that another thread reads from.
    once = {"connection": "close"}
    with ThreadPoolExecutor(70) as pool:

        def overload() -> None:
            answers = pool.map(lambda _: http.post("/v1/completions", json=body, headers=once).status_code, range(70))
            assert set(answers) == {200, 429}

        # A call that somebody kept would be its body, its headers and its task, some 5000 bytes. Connections that
        # happen to be open are some 100 kB more or less.
        assert memory_grown_by(engine, wait_until, overload, num_rounds=8) < 8 * 70 * 1000


def test_a_request_that_fails_does_not_harm_those_beside_it(http, engine, monkeypatch, caplog, wait_until):
    prompts = [f"neighbour {i}" for i in range(5)]
    expected = [complete(http, prompt=prompt, **GREEDY)["choices"][0]["text"] for prompt in prompts]
    caplog.set_level(logging.CRITICAL)
    real = engine_module.Output

    class Fails(StreamDecoder):
        def push(self, token_id):
            raise KeyError("forced")

    def output(event_stream, *, decoder, **rest):
        cursed = bytes(event_stream.request.prompt[:6]) == bytes(engine.encode("cursed"))
        return real(event_stream, decoder=Fails(engine.tokenizer) if cursed else decoder, **rest)

    monkeypatch.setattr(engine_module, "Output", output)
    with ThreadPoolExecutor(6) as pool:
        for _ in range(4):
            bad = pool.submit(http.post, "/v1/completions", json={"prompt": "cursed", **GREEDY})
            good = list(pool.map(lambda prompt: complete(http, prompt=prompt, **GREEDY), prompts))
            assert [one["choices"][0]["text"] for one in good] == expected
            assert (bad.result().status_code, bad.result().json()["error"]["type"]) == (500, "server_error")
    check_all_free(engine, wait_until)


def test_lost_device_state_ends_what_ran_and_what_waited_is_served(http, engine, before_each, caplog, wait_until):
    caplog.set_level(logging.CRITICAL)
    expected = complete(http, prompt="a", **GREEDY)["choices"][0]["text"]
    once = threading.Event()

    def lose_state():
        if engine.stats().num_waiting >= 2 and not once.is_set():
            once.set()
            jax.tree.map(lambda leaf: leaf.delete(), engine._runner.state)
            raise RuntimeError("forced")

    with before_each(engine, "decode", lose_state), ThreadPoolExecutor(7) as pool:
        while not once.is_set():
            answers = list(pool.map(lambda _: http.post("/v1/completions", json={"prompt": "a", **GREEDY}), range(7)))
    assert [answer.status_code for answer in answers].count(500) in (1, 2, 3)
    assert {a.json()["choices"][0]["text"] for a in answers if a.status_code == 200} == {expected}
    check_all_free(engine, wait_until)

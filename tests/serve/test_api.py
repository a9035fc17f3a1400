import asyncio
import json
import logging
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from openai_calls import GREEDY, LOCAL, chunks_of, complete, counts, error_of, metric, stream

from gcompute.cli.signals import stop_signals
from gcompute.config.serve import ServeConfig
from gcompute.serve import client, sse
from gcompute.serve.request import Sampling
from gcompute.serve.server import background, bind, serve, url_of


@pytest.mark.oldest
def test_a_completion_is_the_engines_own_with_usage(http, engine):
    body = complete(http, model="tiny", prompt="once upon", **GREEDY)
    expected = engine.generate(["once upon"], Sampling(**GREEDY))[0]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["model"] == "tiny"
    assert body["choices"] == [{"index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length"}]
    assert counts(body["usage"]) == {"prompt_tokens": 9, "completion_tokens": 12, "total_tokens": 21}


@pytest.mark.oldest
def test_a_stream_gives_the_same_text_in_pieces_then_usage_and_done(http):
    whole = complete(http, prompt="once upon", **GREEDY)
    *chunks, usage, done = stream(http, prompt="once upon", stream_options={"include_usage": True}, **GREEDY)
    assert done == "[DONE]"
    assert (usage["choices"], counts(usage["usage"])) == ([], counts(whole["usage"]))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert len(chunks) > 3
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert len({chunk["id"] for chunk in [*chunks, usage]}) == 1
    plain = stream(http, prompt="once upon", **GREEDY)
    assert "usage" not in plain[0]
    assert plain[-1] == "[DONE]"
    running = stream(http, prompt="x", stream_options={"continuous_usage_stats": True}, **GREEDY)[:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in running][-1] == 12
    assert running[0]["usage"]["completion_tokens"] == 1


@pytest.mark.oldest
def test_every_form_of_prompt_and_n_and_echo(http, tokenizer):
    one, two = (complete(http, prompt=text, **GREEDY)["choices"][0]["text"] for text in ("one", "two"))
    both = complete(http, prompt=["one", "two"], **GREEDY)
    assert [choice["text"] for choice in both["choices"]] == [one, two]
    assert [choice["index"] for choice in both["choices"]] == [0, 1]
    assert counts(both["usage"]) == {"prompt_tokens": 6, "completion_tokens": 24, "total_tokens": 30}
    ids = [tokenizer.encode("one"), tokenizer.encode("two")]
    assert complete(http, prompt=ids[0], **GREEDY)["choices"][0]["text"] == one
    assert [c["text"] for c in complete(http, prompt=ids, echo=True, **GREEDY)["choices"]] == ["one" + one, "two" + two]
    assert "".join(c["choices"][0]["text"] for c in stream(http, prompt="one", echo=True, **GREEDY)[:-1]) == "one" + one
    several = complete(http, prompt="one", n=3, seed=5, max_tokens=8, ignore_eos=True)
    assert several["usage"]["prompt_tokens"] == 3
    texts = [choice["text"] for choice in several["choices"]]
    assert len(set(texts)) == 3
    assert texts == [
        c["text"] for c in complete(http, prompt="one", n=3, seed=5, max_tokens=8, ignore_eos=True)["choices"]
    ]
    pieces = ["", "", ""]
    for chunk in stream(http, prompt="one", n=3, seed=5, max_tokens=8, ignore_eos=True)[:-1]:
        pieces[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert pieces == texts
    assert complete(http, prompt="", max_tokens=2)["usage"]["prompt_tokens"] == 1
    assert complete(http, prompt="x")["usage"]["completion_tokens"] <= 16


def test_an_echo_with_logprobs_scores_the_prompt(http):
    scored = {"prompt": "twofold", "echo": True, "logprobs": 2, "temperature": 0, "ignore_eos": True}
    whole = complete(http, **scored, max_tokens=2)["choices"][0]
    reports = whole["logprobs"]
    assert [len(column) for column in reports.values()] == [9] * 4
    assert "".join(reports["tokens"][:7]) == "twofold"
    assert reports["text_offset"] == list(range(9))
    assert (reports["token_logprobs"][0], reports["top_logprobs"][0]) == (None, None)
    assert all(value < 0 for value in reports["token_logprobs"][1:])
    for token, value, top in list(zip(*list(reports.values())[:3], strict=True))[1:]:
        assert top[token] == value
        assert 2 <= len(top) <= 3
    # One token of output tells of that one alone, and none of none, as lm-eval's requests ask.
    for most in (1, 0):
        less = complete(http, **scored, max_tokens=most)
        choice = less["choices"][0]
        assert choice["logprobs"] == {name: column[: 7 + most] for name, column in reports.items()}
        assert choice["text"] == whole["text"][: 7 + most]
        assert choice["finish_reason"] == "length"
        assert counts(less["usage"]) == {"prompt_tokens": 7, "completion_tokens": most, "total_tokens": 7 + most}
        chunks = stream(http, **scored, max_tokens=most)
        parts = [chunk["choices"][0] for chunk in chunks[:-1]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        columns = [part["logprobs"] for part in parts if part["logprobs"]]
        assert {name: [value for one in columns for value in one[name]] for name in reports} == choice["logprobs"]
    # Each prompt of several has its own.
    two = complete(http, **{**scored, "prompt": ["twofold", "ab"]}, max_tokens=0)["choices"]
    assert two[0]["logprobs"]["tokens"] == reports["tokens"][:7]
    assert two[1]["logprobs"]["tokens"] == ["a", "b"]


def test_no_prompt_is_an_empty_one(http):
    expected = complete(http, prompt="", **GREEDY)["choices"]
    assert complete(http, prompt=None, **GREEDY)["choices"] == complete(http, **GREEDY)["choices"] == expected


def test_control_tokens_are_left_out_of_the_text_unless_asked_for(http, tokenizer):
    end, letter = tokenizer.end_of_text, ord("a")
    body = {"prompt": "x", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    # Turn about, for each that came is the less likely the next time.
    body |= {"logit_bias": {str(end): 100, str(letter): 100}, "frequency_penalty": 2, "presence_penalty": 2}
    hidden = complete(http, **body)["choices"][0]
    assert complete(http, **body, skip_special_tokens=True)["choices"][0] == hidden
    shown = complete(http, **body, skip_special_tokens=False)["choices"][0]
    assert shown["logprobs"]["tokens"] == hidden["logprobs"]["tokens"]
    assert hidden["text"] == shown["text"].replace("<|endoftext|>", "")
    assert "" != hidden["text"] != shown["text"]
    for choice in (hidden, shown):
        columns = choice["logprobs"]
        for token, at in zip(columns["tokens"], columns["text_offset"], strict=True):
            # Counted from the beginning of the prompt, "x".
            assert choice["text"].startswith(token, at - 1) or (choice is hidden and token == "<|endoftext|>")


def test_stop_strings_end_the_text_whether_streamed_or_not(http):
    text = complete(http, prompt="once upon", **GREEDY)["choices"][0]["text"]
    stop = text[3:6]
    cut = text[: text.index(stop)]
    for value in (stop, ["never", stop]):
        choice = complete(http, prompt="once upon", stop=value, **GREEDY)["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (cut, "stop")
    chunks = stream(http, prompt="once upon", stop=stop, **GREEDY)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == cut
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_concurrent_calls_get_their_own_answers(http):
    prompts = [f"prompt {i}" for i in range(6)]
    alone = [complete(http, prompt=prompt, **GREEDY)["choices"][0]["text"] for prompt in prompts]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda prompt: complete(http, prompt=prompt, **GREEDY), prompts))
    assert [body["choices"][0]["text"] for body in together] == alone


@pytest.mark.oldest
def test_models_and_health(http):
    listed = http.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["tiny"]
    assert http.get("/v1/models/tiny").json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 64
    assert (http.get("/health").status_code, http.get("/health").json()) == (200, {"status": "ready"})


@pytest.mark.oldest
def test_metrics_count_what_was_done(http, engine):
    before = {name: metric(http, name) for name in ("gcompute_output_tokens_total", "gcompute_prompt_tokens_total")}
    complete(http, prompt="abc", **GREEDY)
    assert metric(http, "gcompute_output_tokens_total") == before["gcompute_output_tokens_total"] + 12
    assert metric(http, "gcompute_prompt_tokens_total") == before["gcompute_prompt_tokens_total"] + 3
    assert metric(http, 'gcompute_requests_total{reason="length"}') >= 1
    assert metric(http, "gcompute_time_to_first_token_seconds_count") >= 1
    assert metric(http, "gcompute_slots") == 3
    assert metric(http, "gcompute_running") == metric(http, "gcompute_kv_cells_used") == 0
    # Those that score prompts come with the first that asks for it.
    assert metric(http, "gcompute_programs") >= len(engine.programs())


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_disconnects_frees_its_slots(url, engine, gate, monkeypatch, wait_until, streamed):
    cancelled = threading.Event()
    real_cancel = engine.cancel

    def cancel(stream):
        real_cancel(stream)
        cancelled.set()

    monkeypatch.setattr(engine, "cancel", cancel)
    refused = httpx.get(f"{url}/metrics", trust_env=False).text.count('gcompute_rejected_total{status="503"} 0.0')
    assert refused == 1
    body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "n": 4, "stream": streamed}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as leaving:
        leaving.sendall(head.encode() + content)
        if streamed:
            received = b""
            while b"data: " not in received:
                received += leaving.recv(4096)
        assert gate.reached.wait(30)
    assert cancelled.wait(30)
    assert engine.stats().num_running == 3
    gate.open.set()
    wait_until(engine, lambda: engine.stats().num_running == engine.stats().num_waiting == 0)
    assert engine._scheduler.num_free_slots == 3
    assert len(engine.generate(["after"], Sampling(max_tokens=3, ignore_eos=True))[0].ids) == 3
    # Nobody was refused: who asked has left.
    assert 'gcompute_rejected_total{status="503"} 0.0' in httpx.get(f"{url}/metrics", trust_env=False).text


def test_a_full_queue_is_a_429_and_the_accepted_finish(http, engine, gate, wait_until):
    with ThreadPoolExecutor(7) as pool:
        accepted = [pool.submit(complete, http, prompt=f"{i}", **GREEDY) for i in range(7)]
        assert gate.reached.wait(30)
        wait_until(engine, lambda: engine.stats().num_running + engine.stats().num_waiting == 7)
        response = http.post("/v1/completions", json={"prompt": "one more"})
        error_of(response, 429, code="queue_full")
        assert int(response.headers["Retry-After"]) >= 1
        gate.open.set()
        assert all(future.result()["usage"]["completion_tokens"] == 12 for future in accepted)


def test_a_failure_in_mid_stream_is_an_error_event_and_then_the_end(http, engine, before_each, caplog):
    caplog.set_level(logging.CRITICAL)

    def fail():
        raise RuntimeError("forced")

    with before_each(engine, "decode", fail):
        *chunks, last = stream(http, prompt="a", **GREEDY)
        whole = http.post("/v1/completions", json={"prompt": "a", **GREEDY})
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None]
    assert list(last) == ["error"]
    assert "forced" in last["error"]["message"]
    assert "forced" in error_of(whole, 500)
    assert complete(http, prompt="a", **GREEDY)["choices"][0]["finish_reason"] == "length"


def test_before_it_is_ready_calls_are_answered_503(small_engine):
    with background(small_engine, LOCAL, model_name="tiny") as url, httpx.Client(base_url=url, trust_env=False) as http:
        for response in (http.get("/health"), http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})):
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
        assert http.get("/health").json() == {"status": "loading"}
        small_engine.start()
        small_engine.wait_ready()
        assert complete(http, prompt="a", max_tokens=1)
        small_engine.drain()
        assert http.get("/health").json() == {"status": "draining"}
        error_of(http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}), 503, code="not_ready")
        small_engine.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_under_load_lets_accepted_requests_finish_and_closes_the_engine(small_engine, number, before_each):
    results = []
    small_engine.warmup()
    submitted = threading.Semaphore(0)
    real_submit = small_engine.submit_all

    def submit_all(requests):
        streams = real_submit(requests)
        submitted.release()
        return streams

    small_engine.submit_all = submit_all
    signalled = threading.Event()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http, ThreadPoolExecutor(6) as pool:
            body = {"max_tokens": 10, "ignore_eos": True}
            calls = [pool.submit(complete, http, prompt="ab", **body) for _ in range(3)]
            calls += [pool.submit(stream, http, prompt="ab", **body) for _ in range(3)]
            for _ in calls:
                assert submitted.acquire(timeout=30)
            os.kill(os.getpid(), number)
            if number == signal.SIGHUP:
                # A closed terminal may send a second, which does not insist as Ctrl-C does.
                os.kill(os.getpid(), number)
            signalled.set()
            results.extend(call.result() for call in calls)

    threads = []

    def announce(url: str) -> None:
        threads.append(threading.Thread(target=load, args=(url,)))
        threads[0].start()

    with before_each(small_engine, "decode", lambda: signalled.wait(30)):
        serve(small_engine, LOCAL, model_name="tiny", announce=announce, signals=stop_signals())
    threads[0].join()
    assert [result["usage"]["completion_tokens"] for result in results[:3]] == [10] * 3
    assert all(result[-1] == "[DONE]" for result in results[3:])
    assert small_engine.stats().status == "closed"


def test_a_port_in_use_and_a_foreign_host_are_refused_in_one_line(small_engine):
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert url_of(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(ValueError, match=f"port {port} of '127.0.0.1' is in use"):
            serve(small_engine, ServeConfig(port=port), model_name="tiny", announce=print)
    for host in ("192.0.2.1", "no host", "x" * 300):
        with pytest.raises(ValueError, match=r"host|listened on"):
            bind(host, 0)


@pytest.mark.oldest
def test_the_measuring_client_reports_text_times_and_totals(url, engine):
    prompts = ["alpha", "beta", "gamma", "delta"]
    load = client.measure(url, prompts, **GREEDY)
    expected = engine.generate(prompts, Sampling(**GREEDY))
    assert [done.text for done in load.completions] == [done.text for done in expected]
    assert [done.prompt_tokens for done in load.completions] == [5, 4, 5, 5]
    assert load.num_tokens == 48
    assert load.tokens_per_s == pytest.approx(48 / load.wall_s)
    for done in load.completions:
        assert 0 < done.first_token_s <= done.total_s <= load.wall_s
        assert done.per_token_s == pytest.approx((done.total_s - done.first_token_s) / 11)
        assert done.finish_reason == "length"
    assert len(client.measure(url, prompts, concurrency=1, **GREEDY).completions) == 4


def test_the_measuring_client_says_what_went_wrong(url):
    with pytest.raises(ValueError, match="answered 400"):
        client.measure(url, ["a"], max_tokens=0)
    with pytest.raises(ValueError, match="no prompts"):
        client.measure(url, [])
    with bind("127.0.0.1", 0) as sock:
        closed = url_of(sock)
    with pytest.raises(ValueError, match="did not answer"):
        client.measure(closed, ["a"])


def test_streams_read_in_one_loop_are_interleaved(http, url):
    async def both() -> list[str]:
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as http:
            bodies = [{"prompt": text, "stream": True, **GREEDY} for text in ("one", "two", "three")]
            answers = await asyncio.gather(*(http.post("/v1/completions", json=body) for body in bodies))
            return ["".join(c["choices"][0]["text"] for c in chunks_of(a.text)[:-1]) for a in answers]

    assert asyncio.run(both()) == [
        complete(http, prompt=t, **GREEDY)["choices"][0]["text"] for t in ("one", "two", "three")
    ]


def test_usage_says_what_the_prefix_cache_had(http, engine):
    body = {"prompt": "a prompt of more than one page, and then some", **GREEDY, "max_tokens": 2}
    complete(http, **body)
    again = complete(http, **body)["usage"]
    cached = again["prompt_tokens_details"]["cached_tokens"]
    page = engine._scheduler.limits.page
    assert cached == (again["prompt_tokens"] - 1) // page * page > 0
    *_, usage, _ = stream(http, **body, stream_options={"include_usage": True})
    assert usage["usage"] == again


def test_a_stream_that_waits_says_that_it_is_alive(http, engine, before_each, monkeypatch):
    monkeypatch.setattr(sse, "SILENCE_S", 0.02)
    body = {"prompt": "a", "max_tokens": 5, "ignore_eos": True, "stream": True}
    with (
        before_each(engine, "decode", lambda: time.sleep(0.1)),
        http.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = list(answer.iter_lines())
    assert ": waiting" in lines
    assert lines[-2] == "data: [DONE]"
    assert {line[:6] for line in lines} == {"", "data: ", ": wait"}

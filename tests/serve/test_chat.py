"""Chat, log-probabilities in both shapes, best_of, API key and timeout, over HTTP."""

import json
import math
import time

import httpx
import pytest
from openai_calls import CHATML, GREEDY, LOCAL, chunks_of, complete, counts, error_of, metric

from gcompute.config.serve import ServeConfig
from gcompute.serve import api
from gcompute.serve.chat import parse_chat
from gcompute.serve.reports import TextOffsets, completions_logprobs
from gcompute.serve.request import RequestError, Sampling
from gcompute.serve.server import background
from gcompute.serve.stream import TokenLogprobs
from gcompute.serve.template import Message, PlainTemplate, load_template

HELLO = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
PROMPT = "system: Be kind.\nuser: Hi\nassistant:"
PATH = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
SHORT = {"max_tokens": 8, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def http(engine):
    with (
        background(engine, LOCAL, model_name="tiny") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=60) as http,
    ):
        yield http


def chat(http, **body):
    response = http.post(PATH, json={"messages": HELLO, **SHORT, **body})
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.oldest
def test_a_chat_is_the_completion_of_its_template(http, engine):
    body = chat(http, model="tiny")
    expected = engine.generate([PROMPT], Sampling(**SHORT, stop=("\nuser:",)))[0]
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    message = {"role": "assistant", "content": expected.text, "refusal": None}
    assert body["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]
    num = len(PROMPT)
    assert counts(body["usage"]) == {"prompt_tokens": num, "completion_tokens": 8, "total_tokens": num + 8}
    parts = [HELLO[0], {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    assert chat(http, messages=parts)["choices"] == body["choices"]
    rest = http.post(PATH, json={"messages": HELLO, "temperature": 0, "ignore_eos": True}).json()
    assert rest["usage"]["total_tokens"] <= 64, "without max_tokens the answer may take all that fits"
    assert chat(http, max_tokens=None, max_completion_tokens=3)["usage"]["completion_tokens"] == 3


@pytest.mark.oldest
def test_a_streamed_chat_begins_with_the_role_and_ends_with_the_reason(http):
    whole = chat(http, n=2, seed=3, temperature=1)
    body = {"messages": HELLO, **SHORT, "n": 2, "seed": 3, "temperature": 1, "stream": True}
    response = http.post(PATH, json={**body, "stream_options": {"include_usage": True}})
    *chunks, usage, done = chunks_of(response.text)
    assert done == "[DONE]"
    assert (usage["choices"], counts(usage["usage"])) == ([], counts(whole["usage"]))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    text, reasons = ["", ""], [[], []]
    for chunk in chunks:
        (choice,) = chunk["choices"]
        text[choice["index"]] += choice["delta"].get("content", "")
        reasons[choice["index"]].append(choice["finish_reason"])
    assert text == [choice["message"]["content"] for choice in whole["choices"]]
    for each in reasons:
        assert each[:-1] == [None] * (len(each) - 1)
        assert each[-1] == "length"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0]"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0]"),
        ({"messages": [HELLO[0], {"role": "user"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "1"}]}]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": 3}]}, "messages[0]"),
        ({"add_generation_prompt": 0}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"logprobs": 3}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_each_bad_chat_is_a_400_that_names_what(http, body, param):
    content = json.dumps({"messages": HELLO, **body}).encode()
    response = http.post(PATH, content=content)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith(param)


def test_a_chat_that_is_too_long_and_an_unknown_model(http):
    long = [{"role": "user", "content": "x" * 80}]
    error_of(http.post(PATH, json={"messages": long}), 400, param="messages", code="context_length_exceeded")
    # So long that it is not even tokenized.
    huge = [{"role": "user", "content": "x" * 500_000}]
    found = error_of(http.post(PATH, json={"messages": huge}), 400, param="messages", code="context_length_exceeded")
    assert "at least" in found
    response = http.post(PATH, json={"messages": HELLO, "model": "gpt-5"})
    error_of(response, 404, param="model", code="model_not_found")


@pytest.mark.oldest
def test_logprobs_of_a_completion(http, engine, tokenizer):
    own = engine.generate(["once"], Sampling(**GREEDY, logprobs=3))[0]
    body = complete(http, prompt="once", logprobs=3, **GREEDY)["choices"][0]
    report = body["logprobs"]
    assert list(report) == ["tokens", "token_logprobs", "top_logprobs", "text_offset"]
    assert {len(values) for values in report.values()} == {12}
    assert report["token_logprobs"] == pytest.approx([one.logprob for one in own.logprobs])
    for token, one, tops in zip(report["tokens"], own.logprobs, report["top_logprobs"], strict=True):
        spelled = tokenizer.spell(one.token)
        assert token == (spelled.decode() if spelled.isascii() else f"bytes:\\x{spelled[0]:02x}")
        assert len(tops) == 3
        # Greedy: the likeliest is the one chosen.
        assert max(tops.values()) == pytest.approx(one.logprob)
    for token, offset in zip(report["tokens"], report["text_offset"], strict=True):
        # Counted from the prompt's beginning, as OpenAI does.
        assert body["text"][offset - 4] == (token if token.isascii() and len(token) == 1 else "\ufffd")
    response = http.post("/v1/completions", json={"prompt": "once", "logprobs": 3, "stream": True, **GREEDY})
    joined: dict[str, list] = {name: [] for name in report}
    for chunk in chunks_of(response.text)[:-1]:
        for name, values in (chunk["choices"][0]["logprobs"] or {}).items():
            joined[name] += values
    assert joined == report
    none = complete(http, prompt="once", logprobs=0, **GREEDY)["choices"][0]["logprobs"]["top_logprobs"]
    assert none == [dict([likeliest]) for likeliest in zip(report["tokens"], report["token_logprobs"], strict=True)]


@pytest.mark.parametrize("start", [3, 9])
def test_no_report_is_of_a_stop_string_and_no_other_is_lost(http, engine, start):
    asked = {"prompt": "once upon", "logprobs": 1, **GREEDY, "max_tokens": 40}
    free = complete(http, **asked)["choices"][0]
    stop = free["text"][start : start + 5]
    end = free["text"].index(stop)
    whole = complete(http, **asked, stop=[stop])["choices"][0]
    assert whole["text"] == free["text"][:end]
    kept = [at for at, offset in enumerate(free["logprobs"]["text_offset"]) if offset - 9 < end]
    assert whole["logprobs"] == {name: [values[at] for at in kept] for name, values in free["logprobs"].items()}
    response = http.post("/v1/completions", json={**asked, "stop": [stop], "stream": True})
    reports = [chunk["choices"][0]["logprobs"] for chunk in chunks_of(response.text)[:-1]]
    joined = {name: [value for one in reports if one for value in one[name]] for name in whole["logprobs"]}
    assert joined == whole["logprobs"]
    # One that begins like a stop string and is none, held back to the end, is reported all the same.
    never = complete(http, **asked, stop=[free["text"][-3:] + "?"])["choices"][0]
    assert (never["text"], never["logprobs"]) == (free["text"], free["logprobs"])
    told = chat(http, logprobs=True, stop=[stop], max_tokens=20, temperature=0)["choices"][0]
    spelled = b"".join(bytes(one["bytes"]) for one in told["logprobs"]["content"])
    assert spelled.decode(errors="replace") == told["message"]["content"]


def test_the_chosen_token_is_among_the_likeliest_and_offsets_count_characters():
    spelled = [b"a", b"\xc3", b"\xa9", b"\xc3", b"c", b"b"]
    reports = [TokenLogprobs(token=at, logprob=-5.0, top=((5, -0.5),)) for at in range(5)]
    told = completions_logprobs(reports, spelled.__getitem__, TextOffsets(2))
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "bytes:\\xc3", "c"]
    assert told["top_logprobs"] == [{"b": -0.5, token: -5.0} for token in told["tokens"]]
    # Both bytes of the character begin where it does; the next is no character, but is shown as one.
    assert told["text_offset"] == [2, 3, 3, 4, 5]


def test_what_asks_for_nothing_is_accepted_whatever_its_name(http):
    sent_back = {**HELLO[0], "tool_calls": [], "refusal": None, "annotations": []}
    nothing = {"reasoning_effort": None, "functions": [], "function_call": "none", "documents": []}
    labels = {"metadata": {"trace": "1"}, "safety_identifier": "u", "prompt_cache_key": "k", "store": False}
    more = {
        "continue_final_message": False,
        "tools": [TOOL],
        "tool_choice": "none",
        "add_special_tokens": False,
        "chat_template_kwargs": {},
        "echo": False,
    }
    found = chat(http, **nothing, **labels, **more, verbosity="medium", messages=[sent_back])
    assert found["choices"][0]["message"] == chat(http, messages=HELLO[:1])["choices"][0]["message"]


def test_the_last_message_is_continued_where_it_is_asked_for(http):
    body = {"messages": [HELLO[1], {"role": "assistant", "content": "on"}], "add_generation_prompt": False}
    continued = chat(http, **body, continue_final_message=True)
    whole = complete(http, prompt="user: Hi\nassistant: on", stop="\nuser:", **SHORT)
    assert continued["choices"][0]["message"]["content"] == whole["choices"][0]["text"]
    assert counts(continued["usage"]) == counts(whole["usage"])
    assert chat(http, **body)["usage"]["prompt_tokens"] == len("user: Hi\nassistant: on\n")
    assert http.post("/tokenize", json={**body, "continue_final_message": True}).json()["count"] == 22


def test_a_chat_that_leaves_no_room_for_the_templates_own_end(engine, tmp_path):
    pytest.importorskip("jinja2")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7]}')
    template = load_template(tmp_path, pytest.fail)
    body = {"model": "tiny", "messages": HELLO[:1], "max_tokens": 4, "stop_token_ids": list(range(20, 36))}
    with pytest.raises(RequestError, match="the most is 15"):
        parse_chat(json.dumps(body).encode(), engine=engine, model_name="tiny", template=template)
    fits = {**body, "stop_token_ids": list(range(20, 35))}
    (request,) = parse_chat(json.dumps(fits).encode(), engine=engine, model_name="tiny", template=template).requests
    assert request.sampling.stop_token_ids == (*range(20, 35), 7)


@pytest.mark.oldest
def test_logprobs_of_a_chat(http):
    body = chat(http, logprobs=True, top_logprobs=2)["choices"][0]
    content = body["logprobs"]["content"]
    assert len(content) == 8
    assert (
        bytes(byte for one in content for byte in one["bytes"]).decode(errors="replace") == body["message"]["content"]
    )
    for one in content:
        assert [list(top) for top in one["top_logprobs"]] == [["token", "logprob", "bytes"]] * 2
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] >= one["top_logprobs"][1]["logprob"]
    assert chat(http, logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_best_of_shows_the_likeliest_a_token(http):
    sampled = {"prompt": "once", "max_tokens": 6, "seed": 1, "ignore_eos": True, "temperature": 1.5}
    each = complete(http, **sampled, n=5, logprobs=0)["choices"]
    means = [math.fsum(choice["logprobs"]["token_logprobs"]) for choice in each]
    order = sorted(range(5), key=lambda index: -means[index])
    best = complete(http, **sampled, n=2, best_of=5)
    assert [choice["text"] for choice in best["choices"]] == [each[index]["text"] for index in order[:2]]
    assert [choice["index"] for choice in best["choices"]] == [0, 1]
    assert best["choices"][0]["logprobs"] is None
    assert counts(best["usage"]) == {"prompt_tokens": 4, "completion_tokens": 30, "total_tokens": 34}


def test_penalties_and_bias_over_http_are_the_engines_own(http, engine):
    settings = {"presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": 4}
    body = complete(http, prompt="once", logit_bias={"97": 5, "98": -100}, stop_token_ids=[99], **settings, **GREEDY)
    sampling = Sampling(**settings, **GREEDY, logit_bias=((97, 5.0), (98, -100.0)), stop_token_ids=(99,))
    assert body["choices"][0]["text"] == engine.generate(["once"], sampling)[0].text
    assert body["choices"][0]["text"] != complete(http, prompt="once", **GREEDY)["choices"][0]["text"]


@pytest.mark.oldest
def test_an_api_key_is_asked_for_under_v1_alone(engine):
    body = {"prompt": "a", "max_tokens": 1}
    with (
        background(engine, LOCAL, model_name="tiny", api_key="secret") as url,
        httpx.Client(base_url=url, trust_env=False) as http,
    ):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for response in (
                http.post("/v1/completions", json=body, headers=headers),
                http.post(PATH, json={"messages": HELLO}, headers=headers),
                http.get("/v1/models", headers=headers),
                http.get("/v1/models/tiny", headers=headers),
            ):
                error_of(response, 401, code="invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"
        odd = http.post("/v1/completions", json=body, headers={"Authorization": b"Bearer \xff\xfe"})
        error_of(odd, 401, code="invalid_api_key")
        assert (http.get("/health").status_code, http.get("/metrics").status_code) == (200, 200)
        key = {"Authorization": "Bearer secret"}
        assert http.post("/v1/completions", json=body, headers=key).status_code == 200
        assert http.get("/v1/models", headers=key).status_code == 200


def test_a_key_that_is_not_ascii_as_clients_and_browsers_write_it(engine):
    with background(engine, LOCAL, model_name="tiny", api_key="clé à") as url:

        def status(key: bytes) -> int:
            headers = [(b"Authorization", b"Bearer " + key)]
            return httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code

        assert [status("clé à".encode(form)) for form in ("utf-8", "latin-1")] == [200, 200]
        assert [status(key) for key in (b"cl", b"cl\xe9", b"?")] == [401] * 3
    with background(engine, LOCAL, model_name="tiny", api_key="☃") as url:
        assert [status(key) for key in ("☃".encode(), b"?")] == [200, 401]


def test_a_call_that_takes_too_long_is_ended_and_its_slot_is_free(engine, gate, wait_until):
    config = ServeConfig(port=0, timeout_s=0.3, max_body_bytes=100)
    with (
        background(engine, config, model_name="tiny") as url,
        httpx.Client(base_url=url, trust_env=False, timeout=30) as http,
    ):
        error_of(http.post("/v1/completions", json={"prompt": "a", **GREEDY}), 408, code="timeout")
        *_, last = chunks_of(http.post("/v1/completions", json={"prompt": "a", "stream": True, **GREEDY}).text)
        assert last["error"]["code"] == "timeout"
        gate.open.set()
        wait_until(engine, lambda: engine.stats().num_running == 0)
        assert complete(http, prompt="a", **GREEDY)["usage"]["completion_tokens"] == 12
        error_of(http.post("/v1/completions", json={"prompt": "a" * 100}), 413, code="body_too_large")


def test_reading_a_call_is_part_of_its_time(engine, monkeypatch):
    real = api.parse_ask

    def slow(*arguments, **keywords):
        time.sleep(0.5)
        return real(*arguments, **keywords)

    monkeypatch.setattr(api, "parse_ask", slow)
    with background(engine, ServeConfig(port=0, timeout_s=0.2), model_name="tiny") as url:
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 1}, trust_env=False)
    error_of(answer, 408, code="timeout")


def test_nothing_compiles_after_warmup_whatever_is_asked(http, engine):
    before = metric(http, "gcompute_compilations_after_warmup_total")
    complete(http, prompt="a", logprobs=5, logit_bias={"1": 1}, presence_penalty=1, n=2, best_of=3, **GREEDY)
    chat(http, logprobs=True, top_logprobs=5, repetition_penalty=1.1, min_tokens=2, seed=1, temperature=0.7, top_k=5)
    assert metric(http, "gcompute_compilations_after_warmup_total") == before == 0


def test_tokens_of_text_and_of_messages(http, engine, tokenizer):
    ids = list(engine.encode("once upon"))
    found = http.post("/tokenize", json={"prompt": "once upon", "add_special_tokens": True})
    assert found.json() == {"count": len(ids), "max_model_len": engine.max_context, "tokens": ids}
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "once upon"}
    of_messages = http.post("/tokenize", json={"messages": HELLO}).json()["tokens"]
    assert of_messages == list(PlainTemplate().encode([Message(**one) for one in HELLO], tokenizer))


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": [3]}, "messages[0]"),
        ("/tokenize", {"prompt": "a", "documents": ["d"]}, "documents"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [True]}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
def test_what_cannot_be_tokenized(http, path, body, param):
    error_of(http.post(path, json=body), 400, param=param)

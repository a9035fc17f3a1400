"""What the API refuses, and how it says so."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai_calls import GREEDY, complete, error_of
from tiers import mostly_slow

from gcompute.serve import api
from gcompute.serve.errors import HttpError, http_error
from gcompute.serve.protocol import KNOWN, NEUTRAL, Ask, parse_ask
from gcompute.serve.request import RequestError

LENGTH = "context_length_exceeded"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [257]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 8}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": "4"}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "temperature": "hot"}, "temperature"),
        ({"prompt": "a", "temperature": -1}, "temperature"),
        ({"prompt": "a", "temperature": 10**400}, "temperature"),
        ({"prompt": "a", "top_p": 2}, "top_p"),
        ({"prompt": "a", "top_k": 1.5}, "top_k"),
        ({"prompt": "a", "min_p": []}, "min_p"),
        ({"prompt": "a", "seed": "x"}, "seed"),
        ({"prompt": "a", "seed": 2**64}, "seed"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": [5]}, "stop"),
        ({"prompt": "a", "stop": ""}, "stop"),
        ({"prompt": "a", "stop": ["x"] * 17}, "stop"),
        ({"prompt": "a", "stream": "yes"}, "stream"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"usage": True}}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": 5}, "stream_options"),
        ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "include_usage"),
        ({"prompt": "a", "n": 0}, "n"),
        ({"prompt": "a", "n": 17}, "n"),
        ({"prompt": "a", "n": 8}, "prompt"),
        ({"prompt": "a", "echo": 1}, "echo"),
        ({"prompt": "a", "ignore_eos": "no"}, "ignore_eos"),
        ({"prompt": "a", "skip_special_tokens": 1}, "skip_special_tokens"),
        ({"prompt": "a", "user": 5}, "user"),
        ({"prompt": "a", "model": 5}, "model"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "max_tokens": False, "echo": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": -1, "echo": True}, "max_tokens"),
        ({"prompt": "a", "presence_penalty": 2.5}, "presence_penalty"),
        ({"prompt": "a", "frequency_penalty": "x"}, "frequency_penalty"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty"),
        ({"prompt": "a", "logit_bias": []}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"x": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"-1": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"257": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 101}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": "1"}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {"5": 1, "05": 1}}, "logit_bias"),
        ({"prompt": "a", "logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
        ({"prompt": "a", "stop_token_ids": [257]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"prompt": "a", "stop_token_ids": list(range(17))}, "stop_token_ids"),
        ({"prompt": "a", "min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"prompt": "a", "n": 2, "best_of": 1}, "best_of"),
        ({"prompt": "a", "best_of": True}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "stream"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "response_format": "json"}, "response_format"),
        ({"prompt": "a", "response_format": {"type": "grammar"}}, "response_format"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "response_format"),
        ({"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": 5}}}, "response_format"),
        ({"prompt": "a", "response_format": {"type": "json_object"}, "ignore_eos": True}, "response_format"),
        ({"prompt": "a", "response_format": {"type": "json_object"}, "min_tokens": 2}, "response_format"),
        ({"prompt": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"prompt": "a", "length_penalty": 2.0}, "length_penalty"),
        ({"prompt": "a", "priority": True}, "priority"),
        ({"prompt": "a", "temprature": 1}, "temprature"),
    ],
)
def test_each_bad_parameter_is_a_400_that_names_it(http, body, param):
    # httpx encodes as UTF-8, which has no lone surrogate; JSON's escapes have.
    content = json.dumps(body).encode()
    message = error_of(http.post("/v1/completions", content=content), 400, param=param)
    assert message


def test_neutral_values_of_what_is_not_built_are_accepted(http):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "best_of": 1, "suffix": None}
    vllm = {"use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "truncate_prompt_tokens": -1}
    neutral |= {**vllm, "priority": 0, "return_token_ids": False, "add_special_tokens": True, "metadata": {"a": "b"}}
    neutral |= {"spaces_between_special_tokens": True, "include_stop_str_in_output": False, "prompt_logprobs": 0}
    plain = complete(http, prompt="a", **GREEDY)["choices"]
    assert (
        complete(http, prompt="a", logprobs=None, user="me", top_k=-1, stop=None, **neutral, **GREEDY)["choices"]
        == plain
    )


@pytest.mark.oldest
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nul",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": NaN}',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 9999,
    ],
)
def test_malformed_json_is_a_400(http, content):
    error_of(http.post("/v1/completions", content=content), 400, code="invalid_json")


def test_too_long_unknown_model_wrong_path_and_wrong_method(http):
    response = http.post("/v1/completions", json={"prompt": "x" * 60, "max_tokens": 10})
    message = error_of(response, 400, param="max_tokens", code="context_length_exceeded")
    assert message.startswith(
        "This model's maximum context length is 64 tokens. However, you requested 70 tokens (60 in"
    )
    response = http.post("/v1/completions", json={"prompt": "x" * 64})
    error_of(response, 400, param="prompt", code="context_length_exceeded")
    response = http.post("/v1/completions", json={"prompt": "x", "model": "gpt-5"})
    assert "`gpt-5` does not exist" in error_of(response, 404, param="model", code="model_not_found")
    error_of(http.get("/v1/models/other"), 404, param="model", code="model_not_found")
    error_of(http.get("/v2"), 404)
    error_of(http.get("/v1/completions"), 405)


def test_a_body_that_is_too_large_is_refused_and_the_connection_lives(http):
    error_of(http.post("/v1/completions", content=b" " * (api.MAX_BODY_BYTES + 1)), 413, code="body_too_large")
    assert complete(http, prompt="a", max_tokens=1)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


BODIES = st.dictionaries(st.sampled_from([*KNOWN, *NEUTRAL]) | st.text(max_size=5), json_values, max_size=6) | (
    st.fixed_dictionaries(
        {"prompt": st.text(max_size=10) | st.lists(st.integers(-1, 300), max_size=5)},
        optional={name: json_values for name in KNOWN if name not in ("prompt", "model")},
    )
)


@pytest.mark.parametrize("num_bodies", mostly_slow([100, 1000], 100))
def test_any_json_is_read_or_refused_with_a_status_below_500(engine, num_bodies):
    @settings(max_examples=num_bodies, deadline=None)
    @given(body=BODIES)
    def read(body):
        try:
            ask = parse_ask(json.dumps(body).encode(), engine=engine, model_name="tiny")
        except (RequestError, HttpError) as error:
            answer = http_error(error)
            assert answer.status in (400, 404)
            assert json.dumps(answer.body()).encode()
            assert len(answer.message) < 500
        else:
            assert isinstance(ask, Ask)
            assert len(ask.requests) == len(ask.echoes) > 0

    read()


def test_a_compressed_body_is_a_415(http):
    packed = gzip.compress(b'{"prompt": "a"}')
    for path in ("/v1/completions", "/tokenize"):
        error_of(
            http.post(path, content=packed, headers={"Content-Encoding": "gzip"}), 415, code="unsupported_encoding"
        )


def test_a_prompt_that_cannot_fit_is_not_tokenized(http, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text: pytest.fail("tokenized"))
    message = error_of(http.post("/v1/completions", json={"prompt": "x" * 1_000_000}), 400, param="prompt", code=LENGTH)
    assert "at least" in message

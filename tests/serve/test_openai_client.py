"""OpenAI's own Python package as a client: what it parses, and which of its exceptions each of our errors becomes."""

import asyncio

import openai
import pytest
from openai_calls import GREEDY, LOCAL

from gcompute.config.serve import ServeConfig
from gcompute.serve.engine import Engine
from gcompute.serve.request import Sampling
from gcompute.serve.server import background

# What OpenAI's API has not, its package sends as it is given.
EXTRA = {"ignore_eos": True}
SHORT = {"model": "tiny", "max_tokens": 12, "temperature": 0, "extra_body": EXTRA}


@pytest.fixture(scope="module")
def locked_url(engine):
    with background(engine, LOCAL, model_name="tiny", api_key="secret") as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "gcompute")
    assert client.models.retrieve("tiny").id == "tiny"


def test_a_completion_and_its_usage(client, engine):
    done = client.completions.create(prompt="once upon", **SHORT)
    expected = engine.generate(["once upon"], Sampling(**GREEDY))[0]
    assert done.choices[0].text == expected.text
    assert (done.object, done.choices[0].finish_reason, done.choices[0].logprobs) == ("text_completion", "length", None)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (9, 12, 21)


def test_a_streamed_completion_is_the_same_text(client):
    whole = client.completions.create(prompt="once upon", **SHORT)
    options = {"include_usage": True}
    with client.completions.create(prompt="once upon", stream=True, stream_options=options, **SHORT) as stream:
        *chunks, last = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert last.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens_details.cached_tokens


def test_logprobs_of_a_completion(client):
    done = client.completions.create(prompt="abc", logprobs=2, **SHORT)
    told = done.choices[0].logprobs
    assert told is not None
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == 12
    for chosen, top in zip(told.token_logprobs, told.top_logprobs, strict=True):
        # Two bytes that are parts of characters may be written alike.
        assert 1 <= len(top) <= 2
        # Greedy: the chosen token is the likeliest.
        assert chosen == pytest.approx(max(top.values()))
        assert chosen <= 0


def test_several_choices_and_several_prompts(client):
    done = client.completions.create(prompt=["a", "b"], n=2, seed=7, **{**SHORT, "temperature": 1})
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    ids = client.completions.create(prompt=[97, 98, 99], **SHORT)
    assert ids.choices[0].text == client.completions.create(prompt="abc", **SHORT).choices[0].text


MESSAGES = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]


def test_a_chat_whole_and_streamed(client):
    whole = client.chat.completions.create(messages=MESSAGES, **SHORT)
    message = whole.choices[0].message
    assert (message.role, message.refusal, message.tool_calls) == ("assistant", None, None)
    assert whole.object == "chat.completion"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    options = {"include_usage": True}
    with client.chat.completions.create(messages=MESSAGES, stream=True, stream_options=options, **SHORT) as stream:
        first, *chunks, last = list(stream)
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert (last.choices, last.usage.total_tokens) == ([], whole.usage.total_tokens)
    assert last.usage.prompt_tokens_details.cached_tokens >= whole.usage.prompt_tokens_details.cached_tokens


def test_an_answer_is_sent_back_as_it_came(client):
    said = [{"role": "user", "content": "hi"}]
    short = {**SHORT, "max_tokens": 3}
    first = client.chat.completions.create(messages=said, **short).choices[0].message
    again = {"role": "user", "content": "go on"}
    found = client.chat.completions.create(messages=[*said, first, again], **short)
    plain = [*said, {"role": "assistant", "content": first.content}, again]
    assert found.choices[0].message == client.chat.completions.create(messages=plain, **short).choices[0].message


def test_a_chat_with_its_newer_name_of_max_tokens_and_logprobs(client):
    rest = {name: value for name, value in SHORT.items() if name != "max_tokens"}
    done = client.chat.completions.create(
        messages=MESSAGES, max_completion_tokens=3, logprobs=True, top_logprobs=2, **rest
    )
    told = done.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    assert len(told.content) == 3
    for token in told.content:
        assert token.logprob == pytest.approx(max(other.logprob for other in token.top_logprobs))
        assert token.bytes is not None


def test_the_packages_own_stream_of_a_chat(client):
    """Its helper gathers the chunks and gives the whole; it takes one that was cut short for an error."""
    text = client.chat.completions.create(messages=MESSAGES, **SHORT).choices[0].message.content
    assert text
    with client.chat.completions.stream(messages=MESSAGES, stop=text[-1], **SHORT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == text.partition(text[-1])[0]
    with (
        client.chat.completions.stream(messages=MESSAGES, **SHORT) as stream,
        pytest.raises(openai.LengthFinishReasonError),
    ):
        stream.get_final_completion()


def test_many_at_once_from_its_asynchronous_client(url, engine):
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            calls = [client.completions.create(prompt=f"p{index}", **SHORT) for index in range(6)]
            return [done.choices[0].text for done in await asyncio.gather(*calls)]

    expected = engine.generate([f"p{index}" for index in range(6)], Sampling(**GREEDY))
    assert asyncio.run(run()) == [one.text for one in expected]


@pytest.mark.parametrize(
    ("values", "kind", "param", "code"),
    [
        ({"prompt": "x" * 60}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"prompt": "x", "temperature": -1}, openai.BadRequestError, "temperature", None),
        ({"prompt": "x", "extra_body": {"colour": 1}}, openai.BadRequestError, "colour", None),
        ({"prompt": "x", "model": "other"}, openai.NotFoundError, "model", "model_not_found"),
    ],
)
def test_errors_become_its_exceptions(client, values, kind, param, code):
    with pytest.raises(kind) as caught:
        client.completions.create(**{**SHORT, **values})
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert isinstance(error.body, dict)
    assert error.body["message"] in str(error)


def test_a_wrong_key(locked_url):
    with (
        openai.OpenAI(base_url=f"{locked_url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"
    with openai.OpenAI(base_url=f"{locked_url}/v1", api_key="secret", max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"


def test_a_full_queue_is_its_rate_limit_error_and_its_retry_waits_it_out(url, gate, engine, wait_until):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        streams = engine.submit_all([_request() for _ in range(3)])
        wait_until(engine, lambda: engine.stats().num_running == 3)
        streams += engine.submit_all([_request() for _ in range(4)])
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(prompt="x", **SHORT)
        assert (caught.value.code, caught.value.type) == ("queue_full", "rate_limit_error")
        assert caught.value.response.headers["retry-after"] == "1"
        gate.open.set()
        for stream in streams:
            stream.result()
        assert client.with_options(max_retries=3).completions.create(prompt="x", **SHORT).usage is not None


def _request():
    from gcompute.serve.request import Request

    return Request(prompt=(1, 2), sampling=Sampling(max_tokens=4, ignore_eos=True))


def test_a_server_that_is_not_ready(params, config, tokenizer):
    serve = ServeConfig(slots=2, max_context=16, precision="float32", port=0)
    engine = Engine(params, config, tokenizer, serve)
    with (
        background(engine, serve, model_name="tiny") as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.completions.create(prompt="x", model="tiny", max_tokens=2)
    assert (caught.value.status_code, caught.value.code) == (503, "not_ready")
    engine.close()

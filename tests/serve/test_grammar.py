"""Output that meets a schema: whatever the model would rather say, whoever its neighbours are, cut off or whole."""

import json
import sys
from dataclasses import replace

import pytest
from openai_calls import chunks_of, complete, error_of

from gcompute.config.serve import ServeConfig
from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.engine import Engine
from gcompute.serve.grammar import Grammars
from gcompute.serve.request import RequestError, Sampling
from gcompute.serve.stream import Reason

pytest.importorskip("llguidance", reason="needs llguidance (pip install 'gcompute[grammar]')")

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["x", "ok"],
    "additionalProperties": False,
}
SCHEMA = json.dumps(POINT)
FORM = {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}
WIDE = Sampling(max_tokens=40, temperature=3.0, json_schema=SCHEMA)


def is_point(text: str) -> bool:
    value = json.loads(text)
    return (
        value.keys() == {"x", "ok"} and type(value["x"]) is int and 0 <= value["x"] <= 99 and type(value["ok"]) is bool
    )


def test_every_output_meets_the_schema_and_neighbours_keep_theirs(engine):
    free = [Sampling(max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(6)]
    expected = [one.ids for one in engine.generate(["abc"] * 6, free)]
    bound = [replace(WIDE, seed=seed, temperature=seed / 3, logit_bias=((ord("!"), 100.0),)) for seed in range(6)]
    # Turn about, more than there are slots.
    mixed = [one for pair in zip(bound, free, strict=True) for one in pair]
    done = engine.generate(["abc"] * 12, mixed)
    assert [one.ids for one in done[1::2]] == expected
    for one in done[::2]:
        assert is_point(one.text)
        assert one.reason is Reason.STOP
    assert len({one.text for one in done[::2]}) > 2
    # The same seed gives the same, in a crowd and alone.
    assert engine.generate(["abc"], bound[5])[0].ids == done[10].ids


def test_what_max_tokens_cuts_off_is_the_beginning_of_one(engine):
    whole = engine.generate(["abc"], replace(WIDE, seed=1))[0]
    cut = engine.generate(["abc"], replace(WIDE, seed=1, max_tokens=5))[0]
    assert (cut.ids, cut.reason) == (whole.ids[:5], Reason.LENGTH)


def test_those_that_give_way_go_on_where_they_were(make_engine):
    serve = ServeConfig(slots=2, max_queue=16, max_context=32, page=8, chunk=16, decode_steps=4, precision="float32")
    each = [replace(WIDE, max_tokens=24, seed=seed) for seed in range(5)]
    prompts = [tuple(range(60 + seed, 67 + seed)) for seed in range(5)]
    with make_engine(serve) as roomy:
        expected = [one.text for one in roomy.generate(prompts, each)]
    assert all(map(is_point, expected))
    for preemption in ("recompute", "swap"):
        with make_engine(replace(serve, kv_tokens=40, preemption=preemption)) as tight:
            assert [one.text for one in tight.generate(prompts, each)] == expected
            assert tight.stats().num_preemptions > 0


@pytest.mark.oldest
def test_response_format_over_http(http):
    answer = complete(http, prompt="a", response_format=FORM, max_tokens=40, seed=3)["choices"][0]
    assert is_point(answer["text"])
    assert answer["finish_reason"] == "stop"
    body = {"prompt": "a", "response_format": FORM, "max_tokens": 40, "seed": 3, "stream": True}
    chunks = chunks_of(http.post("/v1/completions", json=body).text)[:-1]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == answer["text"]
    chat = {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}, "max_tokens": 9}
    content = http.post("/v1/chat/completions", json=chat).json()["choices"][0]["message"]["content"]
    assert content.startswith("{")
    assert complete(http, prompt="a", response_format={"type": "text"}, temperature=0, max_tokens=4)["choices"]
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    message = error_of(
        http.post("/v1/completions", json={"prompt": "a", "response_format": bad}), 400, param="response_format"
    )
    assert "Invalid type: nonsense" in message


@pytest.mark.parametrize("schema", ["{", "[]", '"a"', '{"$ref": "#/nowhere"}', '{"pattern": "(", "type": "string"}'])
def test_a_schema_that_cannot_be_followed_is_refused(tokenizer, schema):
    with pytest.raises(RequestError, match="response_format cannot be met: the schema cannot be"):
        Grammars(tokenizer, 257).start(schema)


def test_what_it_needs_is_said(tokenizer, monkeypatch):
    characters = Tokenizer.from_spec("char", lambda: ["abc"])
    with pytest.raises(RequestError, match="needs a tokenizer with an end-of-text token"):
        Grammars(characters, 3).start(SCHEMA)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'gcompute\[grammar\]'"):
        Grammars(tokenizer, 257).start(SCHEMA)


def test_a_server_that_speculates_refuses(params, config, tokenizer):
    speculating = Engine(params, config, tokenizer, ServeConfig(speculate="ngram", precision="float32"))
    with pytest.raises(RequestError, match="not for servers that speculate"):
        speculating.generate([(1,)], WIDE)


@pytest.mark.parametrize("spec", ["byte", "bpe:400"])
def test_kinds_of_tokenizers_and_a_padded_vocabulary(spec):
    tokenizer = Tokenizer.from_spec(spec, lambda: ['{"x": 12, "ok": true} {"x": 7, "ok": false} ' * 30])
    vocab = 1000
    grammar = Grammars(tokenizer, vocab).start(SCHEMA)
    made = []
    while not grammar.is_complete:
        allowed = [token for token in range(vocab) if grammar.mask()[token // 32] >> (token % 32) & 1]
        assert allowed
        assert max(allowed) < tokenizer.vocab_size
        # The longest that may come: what merges make goes over the borders of the grammar's parts.
        token = max((one for one in allowed if one != tokenizer.end_of_text), key=lambda one: len(tokenizer.spell(one)))
        grammar.accept(token)
        made.append(token)
    assert is_point(tokenizer.decode(made))
    with pytest.raises(ValueError, match="the grammar stopped"):
        grammar.accept(made[0])

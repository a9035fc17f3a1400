"""Patterns that never end, panics of the tokenizers package and ids that no model has, while serving."""

import json
import time

import pytest
from chat_tokenizers import KINDS, added, byte_level
from tokenizers import Regex, pre_tokenizers

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.bounded_tokenizer import LINEAR, BoundedTokenizer, bounded
from gcompute.serve.template import JinjaTemplate, Message

# Its retries run out after a second, and the binding panics.
PANICS = "(a+)+$"
# Its time grows with the square of the text's length: 70 s for 100,000 characters.
QUADRATIC = "a+$"


def tokenizer_of(pattern: str) -> Tokenizer:
    backend = byte_level(added(["<|end|>"]))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), level])
    return Tokenizer(backend)


@pytest.mark.parametrize("make", [lambda one: one, lambda one: BoundedTokenizer(one.backend(), time_s=30)])
def test_a_panic_is_an_error_of_this_text_alone(make):
    tokenizer = make(tokenizer_of(PANICS))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"cannot encode this text: .*retry-limit"):
            tokenizer.encode("a" * 40_000 + "!")
        assert tokenizer.decode(tokenizer.encode("aab")) == "aab"


def test_a_pattern_that_does_not_end_is_stopped():
    tokenizer = bounded(tokenizer_of(QUADRATIC), time_s=1.0)
    began_s = time.monotonic()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"was stopped on this text: it took longer than 1 s"):
            tokenizer.encode("a" * 200_000 + "!")
        assert tokenizer.decode(tokenizer.encode("aab")) == "aab"
    assert time.monotonic() - began_s < 30


def test_a_chat_of_such_a_tokenizer_is_stopped_too_and_others_have_the_same_ids():
    plain = tokenizer_of(QUADRATIC)
    tokenizer = bounded(plain, time_s=1.0)
    template = JinjaTemplate("{{ messages[0].content }}<|end|>", {})

    def ids_of(text: str, of: Tokenizer) -> tuple[int, ...]:
        return template.encode([Message(role="user", content=text)], of)

    for text in ("", "hello <|end|> the \u4f60\n", "aaab"):
        assert ids_of(text, tokenizer) == ids_of(text, plain)
    with pytest.raises(ValueError, match="was stopped on this text"):
        ids_of("a" * 200_000 + "!", tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bounded_tokenizer_does_the_same(kind):
    tokenizer = Tokenizer(KINDS[kind](added(["<|end|>"], plain=["  "])))
    same = BoundedTokenizer(tokenizer.backend(), time_s=30)
    texts = ["", " hello  the", "<|end|>", "\u4f60\U0001f600\ufffd", "a\x00\n"]
    assert same.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (same.fingerprint, same.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    with pytest.raises(ValueError, match="surrogate"):
        same.encode("\ud800")


@pytest.mark.oldest
def test_only_patterns_that_are_not_known_need_a_process():
    assert bounded(known := Tokenizer.from_spec("byte", list)) is known
    assert bounded(known := Tokenizer(KINDS["legacy"]([]))) is known
    for pattern in LINEAR:
        assert bounded(known := tokenizer_of(pattern)) is known
    assert isinstance(bounded(tokenizer_of(r"\s+$")), BoundedTokenizer)


@pytest.mark.parametrize("pattern", LINEAR)
def test_the_known_patterns_take_time_in_proportion_to_the_text(pattern):
    tokenizer = tokenizer_of(pattern)
    began_s = time.monotonic()
    for part in ("a", " ", "A", "\n ", "!", "1"):
        tokenizer.encode(part * 200_000 + "\u4f60")
    # One that grows with the square needs minutes for one of them.
    assert time.monotonic() - began_s < 60


@pytest.mark.parametrize("place", ["vocab", "added"])
@pytest.mark.parametrize("largest", [3_000_000_000, 1 << 24, 1 << 70])
def test_an_id_that_no_model_has_is_refused_in_one_line(place, largest, tmp_path):
    description = json.loads(byte_level(added(["<|end|>"])).to_str())
    if place == "vocab":
        description["model"]["vocab"]["zz"] = largest
    else:
        description["added_tokens"][0]["id"] = largest
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(description), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"has the token id {largest}: ids are below 16,777,216\."):
        Tokenizer.load(path)


def test_a_panic_in_decoding_is_an_error(monkeypatch):
    tokenizer = Tokenizer(byte_level([]))

    class Panics:
        def decode(self, *_, **__):
            raise type("PanicException", (BaseException,), {})("broken")

    tokenizer.__dict__["_byte_of_token"] = {}
    monkeypatch.setattr(tokenizer, "_backend", Panics())
    with pytest.raises(ValueError, match="cannot decode these ids: broken"):
        tokenizer.decode([1])

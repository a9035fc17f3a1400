"""The pieces of a streamed answer are the text of the whole, for every kind of tokenizer and whatever the ids."""

import pytest
from chat_tokenizers import KINDS, added
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gcompute.model.tokenizer import StreamDecoder, Tokenizer

TOKENIZERS = {kind: Tokenizer(make(added(["<s>"], plain=["  "]))) for kind, make in KINDS.items()}
FALLBACK = TOKENIZERS["legacy"]
REPLACEMENT = "\ufffd"
CHARACTERS = st.characters(exclude_categories=["Cs"])


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer)
    return [*map(decoder.push, ids), decoder.flush()]


def bytes_of(text: bytes) -> list[int]:
    ids = [FALLBACK.id_of(f"<0x{byte:02X}>") for byte in text]
    return [one for one in ids if one is not None]


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_pieces_make_the_whole_for_any_ids(kind, data):
    tokenizer = TOKENIZERS[kind]
    anywhere = st.integers(0, tokenizer.vocab_size + 2)
    # Mostly bytes and what decodes to U+FFFD.
    few = st.integers(1, 256) if kind not in ("byte-level", "gpt2") else st.integers(0, 255)
    some = tokenizer.encode(REPLACEMENT) + tokenizer.encode("\U0001f600") + tokenizer.encode(" a")
    ids = data.draw(st.lists(st.one_of(anywhere, few, st.sampled_from(some)), max_size=24))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.one_of(CHARACTERS, st.sampled_from(["\ufffd", "\U0001f600", " ", "\u2581", "a"])), max_size=16))
@example("\ufffd\U0001f600")
@example("\ufffd\ufffd\ufffd\ufffd")
def test_pieces_make_the_whole_for_any_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    # As `tokenizers` decodes it: only bytes that are no text are ours to decide.
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids, skip_special_tokens=False)
    if REPLACEMENT not in text:
        assert all(REPLACEMENT not in piece for piece in pieces)


def test_a_replacement_character_that_is_meant_is_shown_at_once_and_loses_nothing_after_it():
    literal = FALLBACK.id_of(REPLACEMENT)
    assert literal is not None
    assert streamed(FALLBACK, [literal, *bytes_of("\U0001f600".encode())]) == ["\ufffd", "", "", "", "\U0001f600", ""]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xf0\x9f\x98\x80\xff", "\U0001f600\ufffd"),
        (b"\xff\xc3\xa9", "\ufffd\u00e9"),
        (b"\xe2\xe2\x82\xac", "\ufffd\u20ac"),
        (b"\xe2\x82a", "\ufffd\ufffda"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
        (b"\xf0\x9f", "\ufffd\ufffd"),
    ],
)
def test_a_byte_that_does_not_fit_takes_no_character_with_it(data, text):
    ids = bytes_of(data)
    assert FALLBACK.decode(ids) == text == "".join(streamed(FALLBACK, ids))


def test_a_byte_token_is_spelled_as_its_byte():
    assert b"".join(map(FALLBACK.spell, bytes_of("\u00e9".encode()))) == "\u00e9".encode()

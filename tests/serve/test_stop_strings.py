"""Stop strings across token borders, in text of many bytes a character: cut exactly, and never held for nothing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcompute.model.tokenizer import StreamDecoder, Tokenizer
from gcompute.serve.request import Request, Sampling
from gcompute.serve.stream import EventStream, Output, Reason, Tokens

TEXT = "naïve ☃☂ snow 雪だるま 😀😁 the end, the end"
BPE = Tokenizer.from_spec("bpe:400", lambda: [TEXT * 20, "the snowman ☃☂ melts 雪" * 20])
BYTES = Tokenizer.from_spec("byte", list)
KINDS = {"byte": BYTES, "bpe": BPE}


def pieces(tokenizer: Tokenizer, text: str, stop: tuple[str, ...], block: int) -> tuple[list[str], Reason | None]:
    """The text of each event when the tokens of `text` come `block` at a time, and why they ended."""
    stream = EventStream(Request(prompt=(1,), sampling=Sampling(max_tokens=1000, stop=stop)), 0)
    output = Output(stream, decoder=StreamDecoder(tokenizer), ends=(), arrived_s=0.0)
    ids = tokenizer.encode(text)
    reason = None
    for start in range(0, len(ids), block):
        reason = output.push(ids[start : start + block], 0.0)
        if reason is not None:
            break
    output.finish(reason or Reason.LENGTH, 0.0)
    return [event.text for event in stream], reason


def test_a_stop_string_in_what_was_held_back_is_the_reason():
    # An unfinished character becomes U+FFFD once nothing more will come.
    stream = EventStream(Request(prompt=(1,), sampling=Sampling(max_tokens=2, stop=("\N{REPLACEMENT CHARACTER}",))), 0)
    output = Output(stream, decoder=StreamDecoder(BYTES), ends=(), arrived_s=0.0)
    assert output.push([*BYTES.encode("a"), 0xE9], 0.0) is Reason.LENGTH
    assert output.finish(Reason.LENGTH, 0.0).reason is Reason.STOP
    assert "".join(event.text for event in stream) == "a"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [1, 3, 100])
@pytest.mark.parametrize("stop", ["☃☂", "☂ s", "雪だ", "😁", "ï", "the end", "w 雪"])
def test_a_stop_string_of_many_bytes_is_cut_exactly(kind, block, stop):
    texts, reason = pieces(KINDS[kind], TEXT, (stop,), block)
    assert "".join(texts) == TEXT[: TEXT.index(stop)]
    assert reason is Reason.STOP


@pytest.mark.parametrize("kind", KINDS)
def test_a_beginning_that_comes_to_nothing_is_shown_whole(kind):
    texts, reason = pieces(KINDS[kind], TEXT, ("☃☃", "the end!", "😀😀", "\N{REPLACEMENT CHARACTER}"), 1)
    assert ("".join(texts), reason) == (TEXT, None)


@pytest.mark.oldest
def test_an_unfinished_character_at_the_end_is_shown_as_replaced():
    stream = EventStream(Request(prompt=(1,), sampling=Sampling(stop=("☃",))), 0)
    output = Output(stream, decoder=StreamDecoder(BYTES), ends=(), arrived_s=0.0)
    ids = BYTES.encode("a☃")[:-1]
    assert output.push(ids, 0.0) is None
    output.finish(Reason.LENGTH, 0.0)
    assert stream.result().text == "a\N{REPLACEMENT CHARACTER}"


letters = st.sampled_from("ab☃é😀")
texts = st.text(letters, max_size=30)
stops = st.lists(st.text(letters, min_size=1, max_size=4), min_size=1, max_size=3).map(tuple)


@settings(max_examples=300, deadline=None)
@given(text=texts, stop=stops, block=st.integers(1, 7))
def test_what_is_shown_is_never_taken_back_and_what_is_held_may_still_be_a_stop(text, stop, block):
    stream = EventStream(Request(prompt=(1,), sampling=Sampling(max_tokens=1000, stop=stop)), 0)
    output = Output(stream, decoder=StreamDecoder(BYTES), ends=(), arrived_s=0.0)
    ids, shown = BYTES.encode(text), ""
    for start in range(0, len(ids), block):
        reason = output.push(ids[start : start + block], 0.0)
        event = stream.get()
        assert isinstance(event, Tokens)
        shown += event.text
        so_far = bytes(byte for token in ids[: start + block] for byte in BYTES.spell(token)).decode(errors="ignore")
        assert so_far.startswith(shown)
        if reason is not None:
            at = len(shown)
            assert any(text.startswith(one, at) for one in stop)
            return
        held = so_far[len(shown) :]
        assert not held or any(one.startswith(held) and one != held for one in stop)
    assert not any(one in text for one in stop)

import asyncio
import threading

import pytest

from gcompute.serve.request import Request, RequestError, Sampling, check_fits, seed_words
from gcompute.serve.stream import EventStream, Finished, Output, Reason, StopFinder, Timing, Tokens, Usage

LAST = Finished(
    reason=Reason.LENGTH,
    text="",
    usage=Usage(prompt_tokens=1, completion_tokens=2),
    timing=Timing(queued_s=0.0, first_token_s=0.1, total_s=0.2),
)


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "max_tokens": (0, -1, 1.5, True, "4", 2**31),
        "temperature": (-0.1, float("nan"), float("inf"), "hot", True, None),
        "top_k": (-2, 1.0, True),
        "top_p": (-0.1, 1.1, float("nan"), "x"),
        "min_p": (-0.1, 1.1, None),
        "seed": (1.5, True, 2**64, -(2**63) - 1, "x"),
        "stop": ("text", ("",), (1,), ["x"], ("x",) * 17, 5),
        "ignore_eos": (1, None, "yes"),
    }.items(),
)
def test_each_bad_value_is_refused_in_one_line_that_names_its_parameter(field, values):
    for value in values:
        with pytest.raises(RequestError) as caught:
            Sampling(**{field: value})
        assert caught.value.param == field
        assert field in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_request_must_fit_the_model():
    def check(prompt, max_tokens=4):
        request = Request(prompt=tuple(prompt), sampling=Sampling(max_tokens=max_tokens))
        check_fits(request, vocab=10, max_context=8)

    check([0, 9, 3, 4])
    for prompt in ([], [10], [-1]):
        with pytest.raises(RequestError) as caught:
            check(prompt)
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError, match=r"context length is 8 tokens\. However, you requested 9") as caught:
        check([1] * 5)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


def test_seeds_are_two_words_and_negative_ones_wrap():
    assert seed_words(5) == (0, 5)
    assert seed_words(2**32 + 7) == (1, 7)
    assert seed_words(-1) == (2**32 - 1, 2**32 - 1)


def put_later(stream: EventStream) -> threading.Thread:
    def run() -> None:
        for token in (1, 2):
            stream.put(Tokens(ids=(token,), text=str(token)))
        stream.put(LAST)

    thread = threading.Timer(0.05, run)
    thread.start()
    return thread


def test_a_thread_and_a_coroutine_both_sleep_until_events_come():
    stream = EventStream(Request(prompt=(1,)), 0)
    thread = put_later(stream)
    assert stream.result().text == "12"
    thread.join()

    async def collect() -> list:
        stream = EventStream(Request(prompt=(1,)), 1)
        thread = put_later(stream)
        events = [event async for event in stream]
        thread.join()
        return events

    assert [type(event) for event in asyncio.run(collect())] == [Tokens, Tokens, Finished]


def test_get_gives_up_after_its_time():
    with pytest.raises(TimeoutError):
        EventStream(Request(prompt=(1,)), 0).get(0.01)


def test_a_stream_whose_reader_has_gone_takes_events_without_failing():
    stream = EventStream(Request(prompt=(1,)), 0)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(stream.next(), 0.01)

    asyncio.run(give_up())
    stream.put(LAST)
    assert stream.get() is LAST


def cut(text: str, stop: tuple[str, ...]) -> str:
    """What remains of a text read whole: everything before the first stop string to be complete in it."""
    for end in range(len(text) + 1):
        starts = [at for s in stop if (at := text[:end].find(s)) >= 0]
        if starts:
            return text[: min(starts)]
    return text


@pytest.mark.parametrize("stop", [("END",), ("aab", "ab"), ("xyzzy", "zz"), ()])
@pytest.mark.parametrize("text", ["aaab then", "one EN END two", "xyzz", "", "EENEND", "a" * 9])
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_stop_strings_are_found_across_pieces_and_never_shown(stop, text, size):
    finder = StopFinder(stop)
    shown = "".join(finder.push(text[i : i + size]) for i in range(0, len(text), size)) + finder.flush()
    if size == 1:
        assert shown == cut(text, stop)
    assert finder.found == any(s in text for s in stop)
    assert not any(s in shown for s in stop)
    assert text.startswith(shown)


class Letters:
    """A decoder of one letter an id that holds id 9 back until it is flushed."""

    held = ""

    def push(self, token_id: int) -> str:
        if token_id == 9:
            self.held = "?"
            return ""
        return chr(ord("a") + token_id)

    def flush(self) -> str:
        return self.held


@pytest.mark.oldest
@pytest.mark.parametrize(
    ("tokens", "reason", "text", "num_tokens"),
    [
        ([0, 1, 7, 3], Reason.STOP, "ab", 3),  # 7 ends the text
        ([0, 1, 2, 3, 4], Reason.LENGTH, "abcd", 4),
        ([0, 1, 2, 9], Reason.LENGTH, "abc?", 4),
        ([0, 4, 5, 1], Reason.STOP, "a", 3),  # "ef" is a stop string
        ([0, 1, 2, 4], Reason.LENGTH, "abce", 4),  # "e" was held back
    ],
)
def test_an_output_ends_at_the_end_token_its_length_or_a_stop_string(tokens, reason, text, num_tokens):
    stream = EventStream(Request(prompt=(1,), sampling=Sampling(max_tokens=4, stop=("ef",))), 0)
    output = Output(stream, decoder=Letters(), ends={7}, arrived_s=1.0)
    output.admit(2.0, num_cached=0)
    got = [output.push(tokens[:2], 3.0), output.push(tokens[2:], 4.0)]
    assert got == [None, reason]
    output.finish(reason, 5.0)
    done = stream.result()
    assert (done.text, done.reason, done.usage.completion_tokens) == (text, reason, num_tokens)
    assert done.timing == Timing(queued_s=1.0, first_token_s=2.0, total_s=4.0)
    assert done.timing.per_token_s(3) == 1.0

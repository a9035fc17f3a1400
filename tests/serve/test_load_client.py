"""The measuring client against servers that answer in every legal way, slowly, wrongly, or not to the end."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from gcompute.serve.load import Arrivals, GivenPrompts, Lengths, RandomPrompts
from gcompute.serve.load_answer import events, read_outcome
from gcompute.serve.load_client import Address, Answer, BrokenAnswer, Client
from gcompute.serve.load_run import Calls, Run, Stop, look, put_load

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
PROMPTS = RandomPrompts(lengths=Lengths(prompt=4, output=3), vocab=9)


def event(text: str | None = "x", finish: str | None = None, **more) -> bytes:
    choices = [] if text is None else [{"index": 0, "text": text, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, **more}).encode() + b"\n\n"


USAGE = event(None, usage={"prompt_tokens": 4, "completion_tokens": 3})
WHOLE = event() * 3 + event("", "length") + USAGE + b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


async def request_of(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    sizes = [line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return await reader.readexactly(int(sizes[0].split(b":")[1])) if sizes else b""


@asynccontextmanager
async def serving(answer: Handler):
    """A server on this machine; each connection is handed to `answer`, and closed when that returns."""
    connections: set[asyncio.Task] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.add(asyncio.current_task())
        try:
            await answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        async with Client(Address.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")) as client:
            yield client
    finally:
        server.close()
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)


def saying(*pieces: bytes, pause_s: float = 0.0, again: bool = True) -> Handler:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request_of(reader)
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
            if not again:
                return

    return answer


def load(answer: Handler, *, num: int = 2, arrivals: Arrivals | None = None, **more) -> Run:
    async def run() -> Run:
        async with serving(answer) as client:
            return await put_load(
                client, Calls(), PROMPTS, arrivals or Arrivals(concurrency=1), num_requests=num, **more
            )

    return asyncio.run(run())


ANSWERS = {
    "chunks": (CHUNKED, chunk(WHOLE), chunk(b""), b""),
    "each byte": tuple(bytes([one]) for one in CHUNKED + chunk(WHOLE[:100]) + chunk(WHOLE[100:]) + b"0\r\n\r\n"),
    "all at once": (CHUNKED + chunk(WHOLE) + b"0\r\n\r\n",),
    "chunk extensions and trailers": (CHUNKED + b"%x;a=b\r\n%b\r\n" % (len(WHOLE), WHOLE) + b"0\r\nx: y\r\n\r\n",),
    "a length": (HEAD + b"Content-Length: %d\r\n\r\n" % len(WHOLE), WHOLE),
    "carriage returns": (CHUNKED, chunk(WHOLE.replace(b"\n", b"\r\n")), b"0\r\n\r\n"),
    "after a 100": (b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED, chunk(WHOLE), b"0\r\n\r\n"),
    "no [DONE]": (CHUNKED, chunk(WHOLE.removesuffix(b"data: [DONE]\n\n")), b"0\r\n\r\n"),
    "comments": (CHUNKED, chunk(b": ping\n\nevent: x\n" + WHOLE), b"0\r\n\r\n"),
}


@pytest.mark.oldest("a length")
@pytest.mark.parametrize("name", ANSWERS)
def test_whole_answers_however_they_are_cut(name: str):
    pieces = ANSWERS[name]
    found = load(saying(*pieces) if name != "chunks" else saying(*pieces[:2], b"0\r\n\r\n"))
    for one in found.outcomes:
        assert one.error is None, one.message
        assert (one.prompt_tokens, one.completion_tokens, len(one.token_s), one.finish_reason) == (4, 3, 3, "length")
        assert one.counted
        assert 0 < one.ttft_s <= one.e2e_s


def test_an_answer_that_ends_with_its_connection():
    found = load(saying(HEAD + b"connection: close\r\n\r\n", WHOLE, again=False))
    assert [one.error for one in found.outcomes] == [None, None]


BROKEN = {
    "HTTP 429": (b'HTTP/1.1 429 Too Many\r\ncontent-length: 28\r\n\r\n{"error":{"message":"full"}}',),
    "HTTP 500": (b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n",),
    "connection lost": (CHUNKED, chunk(event())),
    "stream cut off": (CHUNKED, chunk(event()), b"0\r\n\r\n"),
    "error in the stream": (CHUNKED, chunk(event() + b'data: {"error": {"message": "oom"}}\n\n'), b"0\r\n\r\n"),
    "no stream": (b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}",),
    "not understood": (CHUNKED, chunk(b"data: {not json\n\n"), b"0\r\n\r\n"),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n\r\n",),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_every_failure_is_counted_under_its_kind(kind: str):
    again = kind not in ("connection lost", "not HTTP")
    found = load(saying(*BROKEN[kind], again=again), num=3)
    assert [one.error for one in found.outcomes] == [kind] * 3
    assert all(one.message for one in found.outcomes) or kind == "HTTP 500"
    if kind == "error in the stream":
        assert found.outcomes[0].message == "oom"


@pytest.mark.parametrize("data", [b"zz\r\n", b"-5\r\nabc\r\n", b"\r\n\r\n"])
def test_chunks_that_are_none(data: bytes):
    found = load(saying(CHUNKED + data), num=1)
    assert [one.error for one in found.outcomes] == ["not HTTP"]


def test_a_server_that_dies_in_mid_stream_loses_no_request():
    """Ten streams are open when it dies; the rest find nobody."""

    async def run() -> Run:
        opened, dead = 0, asyncio.Event()

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal opened
            await request_of(reader)
            opened += 1
            writer.write(CHUNKED + chunk(event() * 2))
            await writer.drain()
            if opened == 10:
                server.close()
                dead.set()
            await dead.wait()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with Client(Address.parse(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")) as client:
            return await put_load(client, Calls(), PROMPTS, Arrivals(concurrency=10), num_requests=500)

    found = asyncio.run(run())
    kinds = [one.error for one in found.outcomes]
    assert found.stopped.startswith("the server is gone")
    assert kinds.count("cannot connect") >= 20
    assert set(kinds) <= {"connection lost", "cannot connect", "interrupted"}
    # What came before the end is kept.
    assert all(len(one.token_s) == 2 for one in found.outcomes if one.error == "connection lost")
    assert sorted(one.index for one in found.outcomes) == list(range(len(found.outcomes)))


def test_a_slow_server_is_timed_and_given_up_on():
    slow = saying(CHUNKED, chunk(event()), chunk(event()), chunk(WHOLE), b"0\r\n\r\n", pause_s=0.05)
    one = load(slow, num=1).outcomes[0]
    assert one.error is None
    assert one.ttft_s >= 0.05
    assert one.gaps_s[0] >= 0.045
    found = load(saying(CHUNKED + chunk(event()), b"", b"", pause_s=0.2), num=2, timeout_s=0.1)
    assert [one.error for one in found.outcomes] == ["timeout"] * 2
    assert all(len(one.token_s) == 1 for one in found.outcomes)


def test_an_open_loop_does_not_wait_for_the_server_and_says_what_is_late():
    slow = saying(CHUNKED, chunk(WHOLE) + b"0\r\n\r\n", pause_s=0.1)
    found = load(slow, num=20, arrivals=Arrivals(rate=200.0))
    due = [one.due_s for one in found.outcomes]
    assert due == sorted(due)
    assert max(due) < found.wall_s
    # All are sent before the first is answered twice over, though each takes 0.1 s.
    assert sum(one.e2e_s for one in found.outcomes) > 1.5 * found.wall_s
    assert all(one.late_s >= 0 for one in found.outcomes)
    held = load(slow, num=6, arrivals=Arrivals(rate=1e6, concurrency=2))
    assert held.outcomes[-1].late_s > 0.15


def test_a_duration_ends_sending_and_what_is_under_way_is_waited_for():
    quick = saying(CHUNKED + chunk(WHOLE) + b"0\r\n\r\n", pause_s=0.01)
    for arrivals in (Arrivals(concurrency=2), Arrivals(rate=100.0)):
        found = load(quick, num=None, arrivals=arrivals, duration_s=0.2)
        assert found.outcomes
        assert all(one.error is None for one in found.outcomes)
        assert max(one.sent_s for one in found.outcomes) < 0.2 + 0.1
    with pytest.raises(ValueError, match="has no end"):
        load(quick, num=None, arrivals=Arrivals(concurrency=1))


def test_a_stop_keeps_what_was_measured():
    async def run() -> Run:
        stop = Stop()

        def progress(now) -> None:
            if now.done == 3:
                stop("enough")

        async with serving(saying(CHUNKED + chunk(WHOLE) + b"0\r\n\r\n", pause_s=0.01)) as client:
            return await put_load(
                client, Calls(), PROMPTS, Arrivals(concurrency=2), num_requests=1000, stop=stop, progress=progress
            )

    found = asyncio.run(run())
    assert found.stopped == "enough"
    kinds = [one.error for one in found.outcomes]
    assert 3 <= kinds.count(None) <= 6
    assert kinds.count("interrupted") <= 2
    assert len(kinds) < 10


def test_a_connection_that_closed_while_idle_is_no_failure():
    """The server closes after each answer without saying so, as servers do when a kept connection has been idle."""

    async def run() -> list[int]:
        num_connections = 0

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal num_connections
            num_connections += 1
            await saying(CHUNKED + chunk(WHOLE) + b"0\r\n\r\n", again=False)(reader, writer)

        async with serving(answer) as client:
            found = await put_load(client, Calls(), PROMPTS, Arrivals(concurrency=1), num_requests=5)
        assert [one.error for one in found.outcomes] == [None] * 5
        return [num_connections]

    assert asyncio.run(run()) == [5]


@pytest.mark.oldest
def test_calls_carry_what_was_asked_for():
    bodies = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            bodies.append(json.loads(await request_of(reader)))
            writer.write(CHUNKED + chunk(WHOLE) + b"0\r\n\r\n")

    async def run() -> None:
        async with serving(answer) as client:
            for calls in (Calls(model="m", more={"top_p": 0.5}), Calls(chat=True, ignore_eos=False)):
                prompts = GivenPrompts(prompts=("hi",), outputs=(None,), output=7)
                await put_load(client, calls, prompts, Arrivals(concurrency=1), num_requests=1)

    asyncio.run(run())
    completion, chat = bodies
    assert completion == {
        "model": "m",
        "prompt": "hi",
        "max_tokens": 7,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_p": 0.5,
    }
    assert chat["messages"] == [{"role": "user", "content": "hi"}]
    assert "ignore_eos" not in chat
    assert "model" not in chat


def test_a_chats_opening_is_no_token():
    opening = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    parts = [{"delta": {"content": "a"}}, {"delta": {"content": ""}}, {"delta": {}, "finish_reason": "stop"}]
    lines = [opening, *({"choices": [one]} for one in parts)]
    stream = [(float(at), b"data: " + json.dumps(line).encode() + b"\n\n") for at, line in enumerate(lines, 1)]
    answer = Answer(sent_s=0.0, status=200, headers={"content-type": "text/event-stream"}, parts=stream, end_s=5.0)
    found = read_outcome(answer, index=0, due_s=None, asked_tokens=2, began_s=0.0, prompt_tokens=3)
    assert (found.error, list(found.token_s), found.completion_tokens) == (None, [2.0, 3.0], 2)
    assert (found.counted, found.prompt_tokens, found.ttft_s) == (False, 3, 2.0)


def test_events_are_stamped_when_their_line_ends():
    parts = [(1.0, b"da"), (2.0, b"ta: a\n\nda"), (3.0, b"ta:b\r\n\r\n: no\n"), (4.0, b"data: c")]
    assert list(events(parts)) == [(2.0, b"a"), (3.0, b"b"), (4.0, b"c")]


@pytest.mark.parametrize(
    ("url", "path", "shown"),
    [
        ("http://a:1", "/v1", "http://a:1"),
        ("https://a/v1/", "/v1", "https://a:443"),
        ("http://[::1]:8/x", "/x/v1", "http://[::1]:8/x"),
    ],
)
def test_addresses(url: str, path: str, shown: str):
    address = Address.parse(url)
    assert (address.path, str(address)) == (path, shown)


@pytest.mark.parametrize(
    "url", ["ftp://a", "http://", "http://a:x", "http://a:99999", "http://a/?b", "http://a/ b", ""]
)
def test_what_is_no_address(url: str):
    with pytest.raises(ValueError, match=r"http://127\.0\.0\.1:8000"):
        Address.parse(url)


@pytest.mark.oldest
def test_looking_at_what_is_no_server():
    async def run(answer: Handler):
        async with serving(answer) as client:
            return await look(client)

    def body(status: bytes, text: bytes) -> Handler:
        return saying(b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(text), text))

    models = b'{"data": [{"id": "m", "max_model_len": 64}, {"id": "n"}]}'
    found = asyncio.run(run(body(b"200 OK", models)))
    assert (found.models, found.max_context) == (("m", "n"), 64)
    assert asyncio.run(run(body(b"404 No", b""))).models == ()
    for status, text, said in (
        (b"200 OK", b"<html>", "no OpenAI-compatible server"),
        (b"200 OK", b"[]", "no OpenAI-compatible server"),
        (b"401 No", b'{"error": {"message": "key."}}', "answers 401: key. Give --api-key"),
        (b"503 No", b"loading", "answers 503: loading"),
    ):
        with pytest.raises(ValueError, match=said):
            asyncio.run(run(body(status, text)))


def test_nobody_listens():
    async def run() -> None:
        server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with Client(Address.parse(f"http://127.0.0.1:{port}")) as client:
            with pytest.raises(BrokenAnswer, match="nothing listens there"):
                await client.send(client.get("/models"), Answer(sent_s=0.0))
        async with Client(Address.parse("http://no.such.host.invalid")) as client:
            with pytest.raises(BrokenAnswer, match="cannot be reached"):
                await client.send(client.get("/models"), Answer(sent_s=0.0))

    asyncio.run(run())

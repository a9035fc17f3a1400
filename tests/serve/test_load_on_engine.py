"""Loads on a real engine: lengths are exact, an overload's refusals are counted, and what two clients see agrees."""

import asyncio

import httpx
import pytest
from openai_calls import metric

from gcompute.serve.load import Arrivals, Lengths, RandomPrompts
from gcompute.serve.load_client import Address, Client
from gcompute.serve.load_report import Slo, summarize
from gcompute.serve.load_run import Calls, Run, count_prompt_tokens, look, put_load

PROMPTS = RandomPrompts(lengths=Lengths(prompt=12, output=8, spread=0.5), vocab=257)


def load(url: str, arrivals: Arrivals, num: int, **more) -> Run:
    async def run() -> Run:
        async with Client(Address.parse(url)) as client:
            return await put_load(client, Calls(model="tiny"), PROMPTS, arrivals, num_requests=num, **more)

    return asyncio.run(run())


@pytest.mark.oldest
def test_lengths_are_exact_and_counted_as_the_engine_counts(url, engine):
    before = engine.stats()
    found = load(url, Arrivals(concurrency=3), 12)
    asks = [PROMPTS.ask(index) for index in range(12)]
    by_index = sorted(found.outcomes, key=lambda one: one.index)
    assert [(one.error, one.prompt_tokens, one.completion_tokens, one.finish_reason) for one in by_index] == [
        (None, ask.prompt_tokens, ask.output, "length") for ask in asks
    ]
    after = engine.stats()
    measured = summarize(found, Slo())
    assert measured.output_tokens == after.num_output_tokens - before.num_output_tokens
    assert measured.prompt_tokens == after.num_prompt_tokens - before.num_prompt_tokens
    assert measured.most_under_way == 3
    assert (measured.num_ok, measured.num_failed, measured.counted) == (12, 0, True)
    # Every answer came in more than one piece, in order, before its end.
    for one in found.outcomes:
        assert list(one.token_s) == sorted(one.token_s)
        assert one.sent_s < one.token_s[0] <= one.end_s


def test_an_overload_is_refused_and_every_refusal_counted(url, gate):
    """Three slots and a queue of four: of twenty requests at once, while none can end, seven are taken."""

    async def run() -> Run:
        async with Client(Address.parse(url)) as client:
            refused = asyncio.Event()

            def progress(now) -> None:
                if now.failed == 13:
                    refused.set()

            under_way = asyncio.create_task(
                put_load(
                    client,
                    Calls(model="tiny"),
                    PROMPTS,
                    Arrivals(rate=float("inf")),
                    num_requests=20,
                    progress=progress,
                )
            )
            await asyncio.wait_for(refused.wait(), 60)
            gate.open.set()
            return await under_way

    with httpx.Client(base_url=url, trust_env=False) as http:
        found = summarize(asyncio.run(run()), Slo(e2e_s=1e-9))
        text = http.get("/metrics").text
    assert (found.num_sent, found.num_ok, found.num_failed) == (20, 7, 13)
    assert found.errors == {"HTTP 429": 13}
    assert "queue" in found.messages["HTTP 429"] or "wait" in found.messages["HTTP 429"]
    assert 'gcompute_rejected_total{status="429"}' in text
    assert found.num_good == 0


@pytest.mark.oldest
def test_what_the_server_says_of_itself_and_counts(url):
    async def run():
        async with Client(Address.parse(url)) as client:
            return await look(client), await count_prompt_tokens(client, Calls(model="tiny"), "once upon")

    served, tokens = asyncio.run(run())
    assert (served.models, served.max_context, tokens) == (("tiny",), 64, 9)


def test_a_stop_frees_the_slots(url, engine, gate, wait_until):
    from gcompute.serve.load_run import Stop

    async def run() -> Run:
        stop = Stop()
        async with Client(Address.parse(url)) as client:
            task = asyncio.create_task(
                put_load(client, Calls(), PROMPTS, Arrivals(concurrency=3), num_requests=30, stop=stop)
            )
            await asyncio.to_thread(gate.reached.wait, 30)
            stop("interrupted")
            found = await task
        gate.open.set()
        return found

    found = asyncio.run(run())
    measured = summarize(found, Slo())
    assert (measured.num_unfinished, measured.num_failed, measured.stopped) == (3, 0, "interrupted")
    wait_until(engine, lambda: not engine.stats().num_running)


def test_a_wrong_request_is_a_refusal_with_its_reason(url):
    async def run() -> Run:
        prompts = RandomPrompts(lengths=Lengths(prompt=60, output=60), vocab=257)
        async with Client(Address.parse(url)) as client:
            return await put_load(client, Calls(), prompts, Arrivals(concurrency=1), num_requests=1)

    one = asyncio.run(run()).outcomes[0]
    assert one.error == "HTTP 400"
    assert "maximum context length is 64" in one.message


def test_the_metrics_stay_true(url):
    with httpx.Client(base_url=url, trust_env=False) as http:
        assert metric(http, "gcompute_running") == 0
        assert metric(http, "gcompute_compilations_after_warmup_total") == 0

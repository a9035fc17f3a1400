"""Completing a list of prompts: order, one setting or one each, progress, and what a refusal leaves behind."""

import io

import pytest
import rich.console

from gcompute.serve.request import RequestError, Sampling
from gcompute.serve.stream import Reason

GREEDY = Sampling(max_tokens=4, temperature=0, ignore_eos=True)


def test_more_prompts_than_the_queue_holds_come_back_in_order(engine):
    prompts = [f"prompt {index}" for index in range(20)]
    heard = []
    done = engine.generate(prompts, GREEDY, progress=lambda *at: heard.append(at))
    assert heard == [(index + 1, 20) for index in range(20)]
    assert [one.ids for one in done] == [engine.generate([prompt], GREEDY)[0].ids for prompt in prompts]
    assert {one.reason for one in done} == {Reason.LENGTH}


@pytest.mark.oldest
def test_text_and_ids_and_params_for_each(engine, tokenizer):
    text, ids = engine.generate(["abc", tokenizer.encode("abc")], params=[GREEDY, GREEDY])
    assert text.ids == ids.ids
    assert text.text == tokenizer.decode(text.ids)
    assert engine.generate([]) == []


def test_one_bad_prompt_refuses_all_before_any_runs(engine):
    before = engine.stats().num_prompt_tokens
    with pytest.raises(RequestError, match="token id 999"):
        engine.generate(["fine", [999]], GREEDY)
    assert engine.stats().num_prompt_tokens == before


def test_an_interrupted_list_leaves_nothing_running(engine, wait_until):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(["a"] * 7, Sampling(max_tokens=50, ignore_eos=True), progress=stop)
    wait_until(engine, lambda: engine.stats().num_running == engine.stats().num_waiting == 0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_shown_on_a_terminal_alone(engine, monkeypatch, terminal):
    # A terminal that says it is dumb gets no bar.
    monkeypatch.setenv("TERM", "xterm")
    screen = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(rich.console, "Console", lambda *, stderr: real(file=screen, force_terminal=terminal, width=80))
    assert len(engine.generate(["a", "b"], GREEDY)) == 2
    assert ("2/2" in screen.getvalue()) == terminal
    if not terminal:
        assert screen.getvalue() == ""

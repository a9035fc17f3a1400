"""The load itself: arrivals with the moments of their distribution, prompts of the lengths that were asked for."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from gcompute.config.bench import LoadConfig, PromptConfig
from gcompute.serve.load import Arrivals, Lengths, RandomPrompts, fit_words, read_prompts


def gaps(arrivals: Arrivals, num: int, seed: int = 0) -> np.ndarray:
    return np.diff(list(itertools.islice(arrivals.offsets_s(seed), num + 1)))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_variance_of_a_gamma_distribution(burstiness: float):
    found = gaps(Arrivals(rate=5.0, burstiness=burstiness), 200_000)
    # Gamma of shape k and mean 1 / rate has variance 1 / (k rate^2); the bounds are five standard errors.
    mean, variance = 1 / 5, 1 / (burstiness * 25)
    assert found.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / 200_000))
    kurtosis = 3 + 6 / burstiness
    assert found.var() == pytest.approx(variance, abs=5 * variance * math.sqrt((kurtosis - 1) / 200_000))


def test_a_burstiness_of_one_is_a_poisson_process():
    offsets = np.cumsum(gaps(Arrivals(rate=10.0), 100_000))
    counts = np.bincount(offsets.astype(int))[:-1]
    # Arrivals in a second: mean and variance are both the rate.
    assert counts.mean() == pytest.approx(10, rel=0.02)
    assert counts.var() == pytest.approx(10, rel=0.06)
    assert (gaps(Arrivals(rate=10.0), 100_000) > 0.2).mean() == pytest.approx(math.exp(-2), rel=0.03)


@pytest.mark.oldest
def test_a_seed_gives_the_same_moments_and_another_others():
    one = Arrivals(rate=3.0)
    assert gaps(one, 600, seed=1).tolist() == gaps(one, 600, seed=1).tolist()
    assert gaps(one, 600, seed=1).tolist() != gaps(one, 600, seed=2).tolist()
    # Twice the rate, the same pattern in half the time.
    np.testing.assert_allclose(gaps(Arrivals(rate=6.0), 600), gaps(one, 600) / 2)


def test_all_at_once_and_closed_loops_are_due_at_zero():
    for arrivals in (Arrivals(rate=math.inf), Arrivals(concurrency=3)):
        assert list(itertools.islice(arrivals.offsets_s(0), 3)) == [0, 0, 0]
    assert (
        str(Arrivals(rate=2.5, burstiness=0.5, concurrency=9)) == "2.5 requests/s, burstiness 0.5, at most 9 at a time"
    )


@pytest.mark.oldest
def test_lengths_fill_their_range_evenly():
    prompts = RandomPrompts(lengths=Lengths(prompt=100, output=10, spread=0.3), vocab=50, seed=3)
    asks = [prompts.ask(index) for index in range(2000)]
    sizes, outputs = [ask.prompt_tokens for ask in asks], [ask.output for ask in asks]
    assert (min(sizes), max(sizes), min(outputs), max(outputs)) == (70, 130, 7, 13)
    assert prompts.lengths.most == 143
    assert np.mean(sizes) == pytest.approx(100, abs=5 * 17.6 / math.sqrt(2000))
    assert all(len(ask.prompt) == ask.prompt_tokens for ask in asks)
    assert {token for ask in asks for token in ask.prompt} == set(range(50))
    assert prompts.ask(7) == asks[7]


def test_groups_share_their_prefix_and_nothing_more():
    prompts = RandomPrompts(lengths=Lengths(prompt=40, output=1), vocab=1000, prefix=16, num_prefixes=3)
    asks = [prompts.ask(index).prompt for index in range(9)]
    heads = [tuple(prompt[:16]) for prompt in asks]
    assert heads[:3] == heads[3:6] == heads[6:]
    assert len(set(heads)) == 3
    assert len({tuple(prompt[16:]) for prompt in asks}) == 9
    assert {len(prompt) for prompt in asks} == {40}
    words = RandomPrompts(lengths=Lengths(prompt=40, output=1), prefix=16, words_per_token=0.5).ask(0)
    assert len(words.prompt.split()) == 20


@pytest.mark.oldest
def test_words_are_as_many_as_make_the_tokens():
    # A tokenizer of 3 tokens a word and 5 beside them.
    fitted = fit_words([(8, 29), (16, 53)])
    assert fitted == pytest.approx((1 / 3, -5 / 3))
    prompts = RandomPrompts(lengths=Lengths(prompt=95, output=1), words_per_token=fitted[0], words_more=fitted[1])
    assert len(prompts.ask(0).prompt.split()) == 30
    with pytest.raises(ValueError, match="cannot be set"):
        fit_words([(8, 29), (16, 29)])


@pytest.mark.oldest
def test_files_of_prompts(tmp_path: Path):
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo words\n")
    given = read_prompts(path, output=5)
    assert [given.ask(index).prompt for index in range(3)] == ["one", "two words", "one"]
    assert given.ask(0).output == 5
    path.write_text('{"prompt": "a", "max_tokens": 3}\n{"prompt": [1, 2]}\n')
    given = read_prompts(path, output=5)
    assert [(ask.prompt, ask.output, ask.prompt_tokens) for ask in map(given.ask, range(2))] == [
        ("a", 3, None),
        ([1, 2], 5, 2),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt"),
        ("\n  \n", "holds no prompt"),
        ('{"prompt": ""}', 'line 1 has no "prompt"'),
        ('{"prompt": "a"}\n{"text": "b"}', 'line 2 has no "prompt"'),
        ('{"prompt": [1, true]}', 'line 1 has no "prompt"'),
        ('{"prompt": "a"}\n{', "line 2 is not JSON"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1"),
    ],
)
def test_damaged_files_of_prompts(tmp_path: Path, text: str, said: str):
    path = tmp_path / "prompts"
    path.write_text(text)
    with pytest.raises(ValueError, match=said):
        read_prompts(path, output=5)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none", output=1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "binary", output=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Arrivals(),
        lambda: Arrivals(rate=0.0),
        lambda: Arrivals(rate=-1.0),
        lambda: Arrivals(rate=math.nan),
        lambda: Arrivals(rate=1.0, burstiness=0.0),
        lambda: Arrivals(rate=1.0, burstiness=math.inf),
        lambda: Arrivals(concurrency=0),
        lambda: Lengths(prompt=0, output=1),
        lambda: Lengths(prompt=1, output=0),
        lambda: Lengths(prompt=1, output=1, spread=1.0),
        lambda: RandomPrompts(lengths=Lengths(prompt=10, output=1, spread=0.5), prefix=5),
        lambda: RandomPrompts(lengths=Lengths(prompt=10, output=1), num_prefixes=0),
        lambda: RandomPrompts(lengths=Lengths(prompt=10, output=1), vocab=0),
        lambda: LoadConfig(sweep="1,2", rate=1.0),
        lambda: LoadConfig(sweep="1,x").loads(),
        lambda: LoadConfig(sweep="1.5").loads(),
        lambda: LoadConfig(sweep="inf").loads(),
        lambda: LoadConfig(sweep="speed=1").loads(),
        lambda: LoadConfig(sweep="rate=1,0").loads(),
        lambda: LoadConfig(sweep="").loads(),
        lambda: PromptConfig(prompts="file", prompt=3),
        lambda: PromptConfig(chat=True, vocab=3),
    ],
)
def test_what_is_no_load(make):
    with pytest.raises(ValueError, match=r"--|must be|needs"):
        make()


@pytest.mark.oldest
def test_sweeps_and_how_many_requests():
    assert LoadConfig(sweep="1,2,4").loads() == [(None, 1), (None, 2), (None, 4)]
    assert LoadConfig(sweep="rate=0.5,inf").loads() == [(0.5, None), (math.inf, None)]
    assert LoadConfig().loads() == [(None, 4)]
    assert LoadConfig(rate=2.0).loads() == [(2.0, None)]
    assert [LoadConfig().num_requests(*load) for load in ((None, 1), (None, 16), (2.0, None))] == [20, 128, 100]
    assert LoadConfig(duration=5.0).num_requests(2.0, None) is None
    assert LoadConfig(duration=5.0).num_requests(math.inf, None) == 100
    assert LoadConfig(requests=7).num_requests(None, 2) == 7

"""Greedy decoding without a cache, which the engine is held to."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gcompute.model.transformer import Execution, forward


@partial(jax.jit, static_argnums=0)
def logits_without_cache(config, params, tokens_1T, at):
    return forward(params, tokens_1T, config=config, execution=Execution(compute=jnp.float32))[0][0, at]


def solo_greedy(params, config, prompt, num_tokens):
    """Argmax decoding with the whole text run again for each token, and no cache; padding comes after, so unseen."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        padded = np.zeros((1, config.context), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(logits_without_cache(config, params, padded, np.int32(len(tokens) - 1)))))
    return tuple(tokens[len(prompt) :])


def random_prompts(num, *, longest, vocab=256, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, vocab, rng.integers(1, longest + 1)).tolist()) for _ in range(num)]


def assert_holds(params, config, prompt, reports, num_top):
    """Reports of a prompt's tokens but the first are log_softmax of the logits without a cache."""
    assert [one.token for one in reports] == list(prompt[1:])
    padded = np.zeros((1, config.context), np.int32)
    padded[0, : len(prompt)] = prompt
    for at, one in enumerate(reports):
        logits_V = np.asarray(logits_without_cache(config, params, padded, np.int32(at)), np.float64)
        logprobs_V = logits_V - np.log(np.sum(np.exp(logits_V)))
        # float32 against float64 over 257 terms.
        np.testing.assert_allclose(one.logprob, logprobs_V[one.token], atol=2e-4)
        assert [token for token, _ in one.top] == np.argsort(-logprobs_V, kind="stable")[:num_top].tolist()

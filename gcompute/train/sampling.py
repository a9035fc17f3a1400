"""A short text of the model while it trains, to look at: one sequence on one device, a token at a time.

It is what `gcompute generate` would draw in kind, not in bits: the serving engine compiles its programs for one set of
parameters, and this one program serves every sample of a run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array, Int

from gcompute.config.model import ModelConfig
from gcompute.config.train import RunConfig
from gcompute.model.dropout import GENERATOR
from gcompute.model.kv_cache import init_cache
from gcompute.model.tokenizer import Tokenizer
from gcompute.model.transformer import Execution, Params, forward, unstack
from gcompute.train.corpus import TokenizedCorpus

SAMPLES = "samples.jsonl"
SAMPLE_TOKENS = 64
# The first tokens of the validation split, where no prompt is given.
PROMPT_TOKENS = 16
TEMPERATURE = 0.8
# Parts the keys of samples from all others that come of the run's seed.
DOMAIN = 0x5A3


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What samples continue: its tokens, at least one, and the most tokens that a sample has, the prompt's included."""

    text: str
    tokens: tuple[int, ...]
    length: int


def sample_prompt(run: RunConfig, corpus: TokenizedCorpus) -> Prompt | None:
    """The prompt of the run's samples; None where it takes none.

    Raises:
      ValueError: the tokenizer does not know the prompt, it is empty or fills the context, or the job has several
        processes, of which none has all parameters.
    """
    if not run.train.sample_every:
        return None
    if jax.process_count() > 1:
        raise ValueError(
            f"sample_every={run.train.sample_every} is for a job of one process, and this one has"
            f" {jax.process_count()}: none has all parameters. Use sample_every=0, and gcompute generate afterwards."
        )
    context, text = run.model.context, run.train.sample_prompt
    if text is None:
        tokens = [int(token) for token in corpus.val[: min(PROMPT_TOKENS, context // 2)]] or [0]
        text = corpus.tokenizer.decode(tokens)
    else:
        tokens = corpus.tokenizer.encode(text)
    if not 0 < len(tokens) < context:
        raise ValueError(
            f"sample_prompt is {len(tokens)} tokens: at least 1 and less than the model's context={context} are wanted."
        )
    return Prompt(text=text, tokens=tuple(tokens), length=min(context, len(tokens) + SAMPLE_TOKENS))


def make_sampler(
    run: RunConfig, tokenizer: Tokenizer, prompt: Prompt, execution: Execution
) -> Callable[[Params, int], str]:
    """A function of parameters, however they are sharded, and the step that gives the text after the prompt.

    The same step gives the same text, so a resumed run repeats it. The parameters are copied to one device.
    """
    plain = Execution(compute=execution.compute, residual=execution.residual, unroll=run.model.layers)
    vocab = min(tokenizer.vocab_size, run.model.vocab)
    program = jax.jit(partial(continuation, config=run.model, execution=plain, length=prompt.length, vocab=vocab))
    here = SingleDeviceSharding(jax.local_devices()[0])
    tokens = np.asarray(prompt.tokens, np.int32)
    end = tokenizer.end_of_text

    def sample(params: Params, step: int) -> str:
        key = jax.random.fold_in(jax.random.key(run.train.seed, impl=GENERATOR), DOMAIN)
        placed = jax.device_put((params, tokens, jax.random.fold_in(key, step)), here)
        drawn = np.asarray(program(*placed)).tolist()
        return tokenizer.decode(drawn[: drawn.index(end)] if end in drawn else drawn)

    return sample


def continuation(
    params: Params,
    prompt_P: Int[Array, "p"],
    key: Array,
    *,
    config: ModelConfig,
    execution: Execution,
    length: int,
    vocab: int,
    temperature: float = TEMPERATURE,
) -> Int[Array, "n"]:
    """The `length` - P tokens that follow the prompt, each drawn from softmax(logits / temperature) over the first
    `vocab` ids: what pads the vocabulary stands for no text.
    """
    params = unstack(params, config)
    cache = init_cache(config, batch=1, length=length, dtype=execution.compute)
    num_given = prompt_P.shape[0]
    given = jnp.zeros(length, jnp.int32).at[:num_given].set(prompt_P)
    legal_V = jnp.arange(config.vocab) < vocab

    def step(carry: tuple, position: Array) -> tuple[tuple, Array]:
        cache, token = carry
        logits_BTV, cache = forward(
            params,
            token[None, None],
            config=config,
            execution=execution,
            positions_BT=position[None, None],
            cache=cache,
        )
        logits_V = jnp.where(legal_V, logits_BTV[0, 0] / temperature, -jnp.inf)
        drawn = jax.random.categorical(jax.random.fold_in(key, position), logits_V).astype(jnp.int32)
        token = jnp.where(position + 1 < num_given, given[position + 1], drawn)
        return (cache, token), token

    positions = jnp.arange(length - 1, dtype=jnp.int32)
    _, tokens = jax.lax.scan(step, (cache, given[0]), positions)
    return tokens[num_given - 1 :]

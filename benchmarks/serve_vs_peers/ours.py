"""gcompute's side: the serving decoder and pages in a greedy loop, dispatched as the engine dispatches.

Prompts are read one at a time; decoding takes 8 steps a dispatch, with the pages gathered before and the new cells put
back after it. The last line of output is one JSON object.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from model import (
    CONTEXT,
    DIM,
    EPS,
    FFN,
    GENERATED,
    HEADS,
    KV_HEADS,
    LAYERS,
    PROMPT,
    THETA,
    VOCAB,
    arguments,
    prompts,
    report,
    weights,
)

from gcompute.cli.environment import quiet_backends, restart_fast

PAGE, STEPS = 16, 8
PAGES_A_ROW = -(-(PROMPT + GENERATED) // PAGE)


def model_params() -> Any:
    """The benchmark's weights in the model's own tree, layers stacked."""
    import numpy as np

    named = weights()

    def stacked(name: str, *shape: int) -> Any:
        """[L, ...], from matrices that are [out, in]."""
        return np.stack([named[f"model.layers.{layer}.{name}.weight"].T.reshape(shape) for layer in range(LAYERS)])

    head = DIM // HEADS
    return {
        "embedding_VD": named["model.embed_tokens.weight"],
        "norm": {"scale": named["model.norm.weight"]},
        "blocks": {
            "attention_norm": {"scale": stacked("input_layernorm", DIM)},
            "mlp_norm": {"scale": stacked("post_attention_layernorm", DIM)},
            "attention": {
                "q_DNH": stacked("self_attn.q_proj", DIM, HEADS, head),
                "k_DKH": stacked("self_attn.k_proj", DIM, KV_HEADS, head),
                "v_DKH": stacked("self_attn.v_proj", DIM, KV_HEADS, head),
                "o_NHD": stacked("self_attn.o_proj", HEADS, head, DIM),
            },
            "mlp": {
                "gate_DF": stacked("mlp.gate_proj", DIM, FFN),
                "up_DF": stacked("mlp.up_proj", DIM, FFN),
                "down_FD": stacked("mlp.down_proj", FFN, DIM),
            },
        },
    }


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--weights", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--kv", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--fast", action="store_true", help="restart once with huge pages, as the command line does")
    options = parser.parse_args()
    restart_fast(options.fast)
    quiet_backends()
    sys.path.insert(0, os.fspath(Path(__file__).parent))

    import jax
    import jax.numpy as jnp
    import numpy as np

    from gcompute.config.model import ModelConfig
    from gcompute.measure.roofline import measure_roofline
    from gcompute.model.transformer import Execution
    from gcompute.serve import few_rows
    from gcompute.serve.decoder import forward
    from gcompute.serve.kv_pool import KVPool, empty_pool, gather, put_back
    from gcompute.serve.weights import Layout, serving_weights

    config = ModelConfig(
        vocab=VOCAB,
        layers=LAYERS,
        dim=DIM,
        heads=HEADS,
        kv_heads=KV_HEADS,
        ffn=FFN,
        context=CONTEXT,
        norm_eps=EPS,
        rope_theta=THETA,
    )
    execution, batch = Execution(compute=jnp.bfloat16), options.batch

    def step(laid: Any, tokens_BT: Any, cache: Any, positions_BT: Any, at_B: Any) -> tuple[Any, Any]:
        logits_BV, cache = forward(
            laid,
            tokens_BT,
            config=config,
            execution=execution,
            positions_BT=positions_BT,
            cache=cache,
            logits_at_B=at_B,
        )
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

    def prefill(laid: Any, pool: KVPool, table_N: Any, prompt_T: Any) -> tuple[KVPool, Any]:
        start_1, positions_1T = jnp.zeros(1, jnp.int32), jnp.arange(PROMPT)[None]
        # The pages that the prompt fills; none of its cells is in the pool before.
        tables = table_N[None, : -(-PROMPT // PAGE)]
        cache = gather(pool, tables, execution.compute, num_cells=PROMPT)
        token_1, cache = step(laid, prompt_T[None], cache, positions_1T, jnp.array([PROMPT - 1]))
        count_1 = jnp.full(1, PROMPT)
        return put_back(pool, cache, tables, start_1, count_1, num_cells=PROMPT, after=token_1), token_1[0]

    def decode(laid: Any, pool: KVPool, tables: Any, token_B: Any, length_B: Any) -> tuple[KVPool, Any]:
        def one(carry: Any) -> Any:
            n, cache, token_B, out_BS = carry
            token_B, cache = step(laid, token_B[:, None], cache, (length_B + n)[:, None], jnp.zeros_like(length_B))
            return n + 1, cache, token_B, out_BS.at[:, n].set(token_B)

        cache = gather(pool, tables, execution.compute, num_cells=STEPS)
        begin = (jnp.int32(0), cache, token_B, jnp.zeros((batch, STEPS), jnp.int32))
        n, cache, _, out_BS = jax.lax.while_loop(lambda carry: carry[0] < STEPS, one, begin)
        return put_back(pool, cache, tables, length_B, jnp.broadcast_to(n, (batch,)), num_cells=STEPS), out_BS

    laid = jax.jit(
        partial(
            serving_weights,
            config=config,
            compute=execution.compute,
            layout=Layout.PAIRED,
            int8=options.weights == "int8",
        )
    )(model_params())
    pool = empty_pool(config, num_pages=1 + batch * PAGES_A_ROW, page=PAGE, dtype=options.kv)
    tables = jnp.arange(1, 1 + batch * PAGES_A_ROW, dtype=jnp.int32).reshape(batch, PAGES_A_ROW)
    rows = jnp.asarray(prompts(batch), jnp.int32)
    length_B = jnp.full(batch, PROMPT, jnp.int32)
    chosen = few_rows.COMPILER_OPTIONS if batch <= few_rows.MOST_ROWS else None
    read = jax.jit(prefill, donate_argnums=1).lower(laid, pool, tables[0], rows[0]).compile()
    take = jax.jit(decode, donate_argnums=1).lower(laid, pool, tables, length_B, length_B).compile(chosen)
    prefill_s, decode_s, tokens = [], [], np.zeros((1, 0))
    for _ in range(1 + options.repeats):
        began = time.perf_counter()
        first = []
        for row in range(batch):
            pool, token = read(laid, pool, tables[row], rows[row])
            first.append(int(token))
        prefill_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        pieces = [np.asarray(first, np.int32)[:, None]]
        for number in range(GENERATED // STEPS):
            pool, out_BS = take(laid, pool, tables, jnp.asarray(pieces[-1][:, -1]), length_B + number * STEPS)
            pieces.append(np.asarray(out_BS))
        # One step more than the tokens that count: all dispatches are alike.
        decode_s.append((time.perf_counter() - began) * (GENERATED - 1) / GENERATED)
        tokens = np.concatenate(pieces, axis=1)
    precision = f"{options.weights} weights, {options.kv} keys and values"
    # Measured now, on the machine as it is now: what other work leaves of it changes from minute to minute.
    roofline = measure_roofline()
    report(
        "gcompute",
        batch=batch,
        version=f"jax {jax.__version__}",
        precision=precision,
        prefill_s=prefill_s[1:],
        decode_s=decode_s[1:],
        tokens=tokens,
        roofline_bytes_per_s=roofline.memory_bytes_per_s,
        roofline_flops_per_s=roofline.matmul_flops_per_s["bfloat16"],
    )


if __name__ == "__main__":
    main()

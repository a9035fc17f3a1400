"""The CPU kernels of serving alone, beside what XLA makes of the same work, in turn (A B, A B).

    python benchmarks/serve_kernels/run.py
    python benchmarks/serve_kernels/run.py --only attention --repeats 20
    GCOMPUTE_NATIVE_FLAGS=-mno-avx512f XLA_FLAGS=--xla_cpu_max_isa=AVX2 python benchmarks/serve_kernels/run.py

Products are those of one step of the model of `benchmarks/serve_vs_peers`, each matrix once; attention is that of its
12 layers over random pages. All are in bfloat16. The last line of output is one JSON object; times are medians.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from gcompute.cli.environment import quiet_backends, restart_fast

sys.path.insert(0, os.fspath(Path(__file__).parent.parent / "serve_vs_peers"))

PAGE = 16
ROWS = (1, 8, 32, 128)
# Rows, queries of each, cells that the last query sees.
ATTENTION = ((1, 1, 160), (8, 1, 160), (32, 1, 160), (32, 1, 1024), (1, 128, 128), (1, 256, 2048))
TURNS = 3

Contenders = dict[str, Callable[[], Any]]


def say(text: str) -> None:
    print(text, flush=True)


def products(rows: int) -> tuple[Contenders, float, float]:
    """Calls that multiply every matrix of a step by so many rows; the bytes that they read and their operations."""
    import jax
    import jax.numpy as jnp
    from model import DIM, FFN, HEAD, HEADS, KV_HEADS, LAYERS, VOCAB

    from gcompute.serve.native.products import pack, product

    one_layer = [(HEADS * HEAD + 2 * KV_HEADS * HEAD, DIM), (DIM, HEADS * HEAD), (2 * FFN, DIM), (DIM, FFN)]
    shapes = [*one_layer * LAYERS, (VOCAB, DIM)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    make = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    plain = [make(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    packed = [jax.jit(pack)(w) for w in plain]
    x = {inputs: make(jax.random.key(1), (rows, inputs)) for _, inputs in shapes}

    def by_xla(x: Any, weights: Any) -> Any:
        return [jnp.einsum("mi,oi->mo", x[w.shape[1]], w, preferred_element_type=jnp.float32) for w in weights]

    def by_kernels(x: Any, weights: Any) -> Any:
        found = zip(weights, shapes, strict=True)
        return [product(x[inputs], panels, outputs) for panels, (outputs, inputs) in found]

    numbers = sum(outputs * inputs for outputs, inputs in shapes)
    calls = {
        "kernels": _ready(jax.jit(by_kernels), x, packed),
        "XLA": _ready(jax.jit(by_xla), x, plain),
    }
    return calls, 2.0 * numbers, 2.0 * numbers * rows


def attention(rows: int, queries: int, cells: int) -> tuple[Contenders, float, float]:
    """Calls of every layer's attention; the bytes of keys and values that they read and their operations."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from model import HEAD, HEADS, KV_HEADS, LAYERS

    from gcompute.config.model import ModelConfig
    from gcompute.serve.decoder import attend, visible_cells
    from gcompute.serve.kv_pool import KVPool, gather, started
    from gcompute.serve.native import attention as native
    from gcompute.serve.page_cache import PageCache

    pages = -(-cells // PAGE)
    config = ModelConfig(
        vocab=8, layers=LAYERS, dim=HEADS * HEAD, heads=HEADS, kv_heads=KV_HEADS, ffn=8, context=pages * PAGE
    )
    rng = np.random.default_rng(0)
    shape = (1 + rows * pages, PAGE, config.num_kv_heads, HEAD)

    def random_pages() -> tuple[Any, ...]:
        numbers = [rng.standard_normal(shape, np.float32) for _ in range(LAYERS)]
        return tuple(jax.lax.bitcast_convert_type(jnp.asarray(one, jnp.bfloat16), jnp.uint16) for one in numbers)

    pool = KVPool(k=random_pages(), v=random_pages(), k_scale=(), v_scale=())
    tables = jnp.asarray(1 + rng.permutation(rows * pages).reshape(rows, pages), jnp.int32)
    positions = jnp.tile(jnp.arange(cells - queries, cells, dtype=jnp.int32), (rows, 1))
    q = jnp.asarray(rng.standard_normal((rows, queries, HEADS, HEAD)), jnp.float32)
    compute = jnp.dtype("bfloat16")

    def by_kernels(q: Any, pool: Any) -> Any:
        cache = PageCache(pool=pool, tables_BN=tables, compute=compute)
        return [native.attend(q, cache, layer, positions) for layer in range(LAYERS)]

    def by_xla(q: Any, cache: Any) -> Any:
        return [attend(q, cache, layer, visible_cells(cache, positions), compute) for layer in range(LAYERS)]

    # Gathering is not counted: a dispatch of several steps does it once.
    gathered = jax.block_until_ready(
        jax.jit(lambda pool: started(gather(pool, tables, compute, queries), positions))(pool)
    )
    seen = sum(range(cells - queries + 1, cells + 1))
    calls = {"kernels": _ready(jax.jit(by_kernels), q, pool), "XLA": _ready(jax.jit(by_xla), q, gathered)}
    per_cell = LAYERS * HEAD * rows
    return calls, 4.0 * per_cell * KV_HEADS * cells, 4.0 * per_cell * HEADS * seen


def _ready(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    return lambda: fn(*args)


def compare(name: str, made: tuple[Contenders, float, float], repeats: int, ceilings: Any) -> dict[str, Any]:
    from gcompute.measure.timing import measure

    calls, num_bytes, flops = made
    times: dict[str, list[float]] = {contender: [] for contender in calls}
    for _ in range(TURNS):
        for contender, call in calls.items():
            times[contender].append(measure(call, repeats=repeats).median_s)
    found = {contender: median(some) for contender, some in times.items()}
    # Without products of bfloat16 a processor multiplies float32 faster, and the kernels use that.
    floor = max(num_bytes / ceilings.memory_bytes_per_s, flops / max(ceilings.matmul_flops_per_s.values()))
    say(
        f"{name:<42} {1e3 * found['kernels']:8.2f} ms  XLA {1e3 * found['XLA']:8.2f} ms"
        f"  {num_bytes / found['kernels'] / 1e9:6.1f} GB/s {flops / found['kernels'] / 1e9:6.0f} GFLOP/s"
        f"  {floor / found['kernels']:4.0%} of the roofline"
    )
    return {"case": name, "seconds": found, "bytes": num_bytes, "flops": flops, "roofline_s": floor}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("products", "attention"))
    parser.add_argument("--repeats", type=int, default=10, help=f"calls in each of {TURNS} turns")
    options = parser.parse_args()
    restart_fast(True)
    quiet_backends()
    from gcompute.measure.roofline import measure_roofline
    from gcompute.serve.native import build

    if not build.available():
        raise SystemExit(f"error: the kernels are not available: {build.why_not()}.")
    ceilings = measure_roofline()
    say(
        f"measured: {ceilings.memory_bytes_per_s / 1e9:.1f} GB/s,"
        f" {ceilings.matmul_flops_per_s['bfloat16'] / 1e9:.0f} GFLOP/s of bfloat16,"
        f" {ceilings.matmul_flops_per_s['float32'] / 1e9:.0f} of float32"
    )
    results = []
    if options.only != "attention":
        for rows in ROWS:
            results.append(compare(f"products, {rows} rows", products(rows), options.repeats, ceilings))
    if options.only != "products":
        for rows, queries, cells in ATTENTION:
            name = f"attention, {rows} rows, {queries} queries, {cells} cells"
            results.append(compare(name, attention(rows, queries, cells), options.repeats, ceilings))
    say(json.dumps({"ceilings": ceilings.to_dict(), "results": results}))


if __name__ == "__main__":
    main()

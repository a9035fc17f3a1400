"""gcompute under a load: the bare engine, or the engine behind HTTP for a client to load.

python ours_load.py --slots 32 --rate 10 --requests 200    the engine itself; the last line is one JSON object
python ours_load.py --slots 32 --listen                    a server; it prints its URL and stays until SIGTERM
"""

import argparse
import json
import time
from typing import Any

from model import GENERATED, PROMPT, VOCAB

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache


def put_load(engine: Any, rate: float, num: int, seed: int) -> dict[str, Any]:
    """Requests at the moments at which `gcompute bench serve` sends them; times are the engine's own."""
    import numpy as np

    from gcompute.serve.load import Arrivals
    from gcompute.serve.request import Request, Sampling

    asked = Sampling(max_tokens=GENERATED, temperature=0, ignore_eos=True)
    rows = np.random.default_rng(seed).integers(1, VOCAB, (num, PROMPT)).tolist()
    requests = [Request(prompt=tuple(row), sampling=asked) for row in rows]
    streams, began = [], time.perf_counter()
    for request, due_s in zip(requests, Arrivals(rate=rate).offsets_s(seed), strict=False):
        time.sleep(max(0.0, began + due_s - time.perf_counter()))
        streams.append(engine.submit(request))
    results = [stream.result() for stream in streams]
    wall_s = time.perf_counter() - began
    tokens = sum(len(result.ids) for result in results)
    first_s = sorted(result.timing.first_token_s for result in results)
    per_token_s = [result.timing.per_token_s(GENERATED) for result in results]
    return {
        "requests": num,
        "wall_s": wall_s,
        "output_tokens_per_s": tokens / wall_s,
        "requests_per_s": num / wall_s,
        "ttft_s": {f"p{q}": float(np.percentile(first_s, q)) for q in (50, 90, 99)},
        "tpot_s": {f"p{q}": float(np.percentile(per_token_s, q)) for q in (50, 90, 99)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, required=True)
    parser.add_argument("--listen", action="store_true")
    parser.add_argument("--rate", type=float, default=float("inf"), help="requests a second; inf: all at once")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    restart_fast(True)
    quiet_backends()
    use_compilation_cache()
    from ours_engine import engine, serve_config

    from gcompute.serve.server import serve

    config = serve_config(options.slots, max_queue=max(64, options.requests), port=0)
    if options.listen:
        serve(engine(config), config, model_name="benchmark", announce=lambda url: print(url, flush=True))
        return
    with engine(config) as running:
        put_load(running, float("inf"), 4, seed=1)
        print(json.dumps(put_load(running, options.rate, options.requests, options.seed)), flush=True)


if __name__ == "__main__":
    main()

"""gcompute's side: the engine, offline, with a slot for every sequence and no prefix cache.

Prompts are read one at a time; decoding takes 8 steps a dispatch. The last line of output is one JSON object.
"""

import os
import sys
import time
from pathlib import Path

from model import GENERATED, PROMPT, arguments, prompts, report

from gcompute.cli.environment import quiet_backends, restart_fast, use_compilation_cache


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--weights", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--kv", choices=("bfloat16", "int8"), default="bfloat16")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of what is not int8")
    parser.add_argument("--fast", action="store_true", help="restart once with huge pages, as the command line does")
    options = parser.parse_args()
    restart_fast(options.fast)
    quiet_backends()
    sys.path.insert(0, os.fspath(Path(__file__).parent))

    use_compilation_cache()

    import jax
    import numpy as np
    from ours_engine import engine, serve_config

    from gcompute.measure.roofline import measure_roofline
    from gcompute.serve.request import Request, Sampling
    from gcompute.serve.stream import Tokens

    batch = options.batch
    serve = serve_config(
        batch,
        max_queue=batch,
        # All prompts are read before anybody decodes, as the peers do it.
        token_budget=batch * (PROMPT + 1),
        precision=options.precision,
        weights=None if options.weights == "bfloat16" else "int8",
        kv=None if options.kv == "bfloat16" else "int8",
    )
    asked = Sampling(max_tokens=GENERATED, temperature=0, ignore_eos=True)
    requests = [Request(prompt=tuple(row), sampling=asked) for row in prompts(batch).tolist()]
    prefill_s, decode_s, tokens = [], [], np.zeros((1, 0))
    with engine(serve) as running:
        for _ in range(1 + options.repeats):
            began = time.perf_counter()
            streams = running.submit_all(requests)
            firsts = [stream.get() for stream in streams]
            prefill_s.append(time.perf_counter() - began)
            began = time.perf_counter()
            rest = [list(stream) for stream in streams]
            decode_s.append(time.perf_counter() - began)
            events = [[first, *more] for first, more in zip(firsts, rest, strict=True)]
            tokens = np.array(
                [[token for one in row if isinstance(one, Tokens) for token in one.ids] for row in events]
            )
        assert running.stats().num_late_compilations == 0
    kept = [options.precision if kind == "bfloat16" else kind for kind in (options.weights, options.kv)]
    precision = f"{kept[0]} weights, {kept[1]} keys and values"
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
        roofline_flops_per_s=max(roofline.matmul_flops_per_s.values()),
    )


if __name__ == "__main__":
    main()

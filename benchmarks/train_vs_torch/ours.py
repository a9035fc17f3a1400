"""gcompute's side of the training benchmark: the time of a step of the trainer's own compiled program.

Takes the same sizes as torch_peer.py; the last line of output is one JSON object.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from gcompute.cli.environment import quiet_backends, restart_fast
from gcompute.measure.cache import cache_directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("layers", "dim", "heads", "context", "batch", "vocab"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--time-steps", type=int, required=True, help="steps that count, after a warm-up")
    parser.add_argument("--accumulation", type=int, help="microbatches (default: the trainer's choice)")
    options = parser.parse_args()
    restart_fast(True)
    quiet_backends()

    import jax
    import numpy as np

    from gcompute.config.architecture import architecture
    from gcompute.config.model import ModelConfig
    from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
    from gcompute.measure.roofline import load_or_measure
    from gcompute.plan.mfu import mfu
    from gcompute.train.loop import DISPATCH_S, build_programs, place

    model = ModelConfig(
        vocab=options.vocab,
        layers=options.layers,
        dim=options.dim,
        heads=options.heads,
        context=options.context,
        norm="layernorm",
        positions="learned",
        activation="gelu",
    )
    train = TrainConfig(
        batch=options.batch,
        steps=10**6,
        precision=options.precision,
        accumulation=options.accumulation,
        eval_every=0,
        checkpoint_every=0,
    )
    run = RunConfig(model=model, optimizer=OptimizerConfig(schedule="constant"), train=train, data=DataConfig())
    programs = build_programs(run)
    state = programs.init(jax.random.key(0))
    random = np.random.default_rng(0)
    rows = random.integers(0, model.vocab, (programs.dispatch_steps, options.batch, run.seq), dtype=np.int32)
    inputs, targets = (place(rows, programs.batch_sharding) for _ in range(2))
    count_sharding = programs.abstract_state.step.sharding

    def dispatch(state: Any, num_steps: int) -> tuple[Any, float]:
        started = time.perf_counter()
        state, metrics = programs.steps(state, inputs, targets, place(np.asarray(num_steps, np.int32), count_sharding))
        jax.device_get(metrics)
        return state, (time.perf_counter() - started) / num_steps

    state, first_s = dispatch(state, 1)
    state, second_s = dispatch(state, 1)
    # As the trainer does: as many steps a dispatch as take half a second.
    each = max(1, min(programs.dispatch_steps, int(DISPATCH_S / second_s)))
    times = []
    while len(times) * each < options.time_steps or len(times) < 3:
        state, step_s = dispatch(state, each)
        times.append(step_s)
    times.sort()
    median_s = times[len(times) // 2]
    roofline = load_or_measure(Path(cache_directory()) / "roofline.json")
    peak = roofline.matmul_flops_per_s[options.precision]
    print(
        json.dumps(
            {
                "median_step_s": median_s,
                "min_step_s": times[0],
                "first_step_s": first_s + programs.compile_s,
                "tokens_per_s": options.batch * run.seq / median_s,
                "accumulation": programs.accumulation,
                "steps_a_dispatch": each,
                "precision": options.precision,
                "roofline_flops_per_s": peak,
                "roofline_share": mfu(architecture(model), options.batch, run.seq, median_s, peak),
                "version": jax.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()

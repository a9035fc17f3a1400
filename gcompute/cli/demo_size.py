"""How much the demo trains: the largest model that learns something in the time there is, by the prediction."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from gcompute.config.presets import PRESETS
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

# Largest first: preset and vocabulary of its tokenizer.
LADDER = (("demo", 4096), ("demo-mid", 2048), ("demo-small", 2048))
# Enough to beat the n-gram models where it was tried: demo in 200 steps, demo-small in 300. More than the most is not
# needed to show how training goes.
LEAST_STEPS, MOST_STEPS = 150, 400
# Enough text for the most steps of the largest model without reading any of it twice; read and tokenized in seconds.
TEXT_MB = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoSize:
    """What the demo trains, and the time that was predicted for it. preset: name of the model."""

    preset: str
    run: RunConfig
    predicted_s: float


def demo_run(preset: str, vocab: int, steps: int) -> RunConfig:
    """A run of the demo: one recipe for all of its models."""
    return RunConfig(
        model=PRESETS[preset],
        optimizer=OptimizerConfig(
            optimizer="muon", learning_rate=4e-3, warmup_steps=20, schedule="linear", final_fraction=0.05
        ),
        train=TrainConfig(batch=16, steps=steps, eval_every=100, checkpoint_every=100),
        data=DataConfig(data="stdlib", tokenizer=f"bpe:{vocab}", text_mb=TEXT_MB),
    )


def size_demo(step_s: Callable[[RunConfig], float], *, seconds: float, steps: int | None = None) -> DemoSize:
    """The largest model of the ladder that makes `steps`, or at least `LEAST_STEPS`, in about `seconds`.

    Where not even the smallest does, it is the smallest with that many steps, and takes longer.

    Args:
      step_s: predicts the seconds of one step of a run.
    """
    least = steps or LEAST_STEPS
    *larger, smallest = [(preset, demo_run(preset, vocab, least)) for preset, vocab in LADDER]
    preset, run = next((one for one in larger if least * step_s(one[1]) <= seconds), smallest)
    predicted = step_s(run)
    number = steps or max(LEAST_STEPS, min(MOST_STEPS, int(seconds / predicted) // 10 * 10))
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=number))
    return DemoSize(preset=preset, run=run, predicted_s=number * predicted)

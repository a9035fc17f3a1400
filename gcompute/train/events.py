"""What a training loop tells whoever watches it: the command line, the demo, a notebook."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The program is compiled and the first step is about to run. first_step > 0 after a resume."""

    first_step: int
    num_steps: int
    num_params: int
    accumulation: int
    compile_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """Steps up to and with `step` are done; rates are medians over the last dispatches."""

    step: int
    loss: float
    tokens_per_s: float
    step_s: float
    mfu: float | None
    eta_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """Mean validation loss in nats per token over `num_batches` of the split's `of_batches`."""

    step: int
    loss: float
    num_batches: int
    of_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the model wrote after `prompt` when `step` was done."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint of `step` is being written."""

    step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Something that a person should know and that stops nothing."""

    text: str


Event = Started | Stepped | Evaluated | Sampled | Saved | Notice
Report = Callable[[Event], None]

"""Optimizers and schedules, all from optax."""

import math
from typing import Any

import jax
import optax

from gcompute.config.train import OptimizerConfig

# Share of the steps over which "wsd" (warm-up, stable, decay) decays. Source: Hu et al. 2024 (MiniCPM), section 4.
WSD_DECAY = 0.2


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to the peak, then the schedule's decay to `final_fraction` of it.

    The decay ends at `decay_steps`, else at `steps`, and the rate stays there. A longer warm-up is cut to end with it.
    """
    steps = config.schedule_steps(steps)
    peak, floor = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup(steps), steps)
    after = max(steps - warmup, 1)
    match config.schedule:
        case "cosine":
            decay = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
        case "linear":
            decay = optax.linear_schedule(peak, floor, after)
        case "wsd":
            length = max(math.ceil(WSD_DECAY * after), 1)
            decay = optax.linear_schedule(peak, floor, length, transition_begin=after - length)
        case _:
            decay = optax.constant_schedule(peak)
    if not warmup:
        return decay
    # Step 0 already moves: the warm-up runs from peak/warmup to peak.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, decay], [warmup])


def decays(path: tuple[Any, ...]) -> bool:
    """Whether weight decay applies: to matrices and embeddings, not to biases and norms."""
    name = jax.tree_util.keystr(path[-1:])
    return "bias" not in name and "scale" not in name


def _decay_mask(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def _muon_dims(params: Any) -> Any:
    """Which matrices Muon orthogonalises, and over which dims; the rest (None) is left to Adam.

    A stacked [L, D, N, H] is L matrices from D to N x H, and [L, E, D, F] L x E of them. Embeddings, the output
    layer and routers go to Adam (with Nesterov momentum, as Muon's), as in Jordan et al. 2024 (Muon).
    """
    dims = optax.contrib.MuonDimensionNumbers

    def of(path: tuple[Any, ...], _: Any) -> Any:
        name = jax.tree_util.keystr(path[-1:])
        table = {
            "_DNH": dims((1,), (2, 3)),
            "_DKH": dims((1,), (2, 3)),
            "_NHD": dims((1, 2), (3,)),
            "_DF": dims((1,), (2,)),
            "_FD": dims((1,), (2,)),
            "_EDF": dims((2,), (3,)),
            "_EFD": dims((2,), (3,)),
        }
        if "blocks" in jax.tree_util.keystr(path[:1]):
            for suffix, value in table.items():
                if suffix in name:
                    return value
        return None

    return jax.tree_util.tree_map_with_path(of, params)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then the chosen optimizer with its schedule and masked weight decay.

    Decay is decoupled: each step takes learning rate x weight_decay of a matrix off it, whatever the optimizer. Two
    exceptions: adam has none, and lamb's decay is part of the update that it normalises, as in its paper.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101 (decoupled decay); You et al. 2020, arXiv:1904.00962 (LAMB).
    """
    rate = make_schedule(config, steps)
    decay, b1, b2, eps = config.weight_decay, config.b1, config.b2, config.eps
    match config.optimizer:
        case "adamw":
            rule = optax.adamw(rate, b1, b2, eps, weight_decay=decay, mask=_decay_mask)
        case "nadamw":
            rule = optax.nadamw(rate, b1, b2, eps, weight_decay=decay, mask=_decay_mask)
        case "adam":
            rule = optax.adam(rate, b1, b2, eps)
        case "lion":
            rule = optax.lion(rate, b1, b2, weight_decay=decay, mask=_decay_mask)
        case "lamb":
            rule = optax.lamb(rate, b1, b2, eps, weight_decay=decay, mask=_decay_mask)
        case "adafactor":
            # Its own decay is not multiplied by the learning rate, and would shrink weights by a tenth per step.
            rule = _decayed(optax.adafactor(None), decay, rate)
        case "muon":
            direction = optax.contrib.muon(
                1.0,
                beta=b1,
                adam_b1=b1,
                adam_b2=b2,
                eps=eps,
                muon_weight_dimension_numbers=_muon_dims,
                # Scales each update to the size that Adam's has, so one learning rate serves both groups.
                consistent_rms=0.2,
            )
            # Its own decay has no mask for what Adam updates, and would shrink the norms.
            rule = _decayed(direction, decay, rate)
        case "sgd":
            # Decay that went through the momentum would shrink weights 1 / (1 - b1) times as fast.
            rule = _decayed(optax.sgd(1.0, b1 or None), decay, rate)
        case name:
            raise ValueError(f"optimizer {name!r} is not known.")
    return optax.chain(optax.clip_by_global_norm(config.clip), rule) if config.clip else rule


def _decayed(step: optax.GradientTransformation, decay: float, rate: optax.Schedule) -> optax.GradientTransformation:
    """rate (`step` - decay params): an optimizer that takes whole steps, with masked decay and its learning rate."""
    return optax.chain(
        step, optax.scale(-1.0), optax.add_decayed_weights(decay, _decay_mask), optax.scale_by_learning_rate(rate)
    )

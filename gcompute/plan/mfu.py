"""Model FLOP/s utilisation, in its one meaning here: what the planner predicts and what the trainer measures.

  MFU = model FLOPs per step / (seconds per step x peak FLOP/s of all devices together)

Model FLOPs are those of the forward and the backward pass. Recomputation adds none, so remat lowers the MFU. Of the
scores only those count that the mask keeps, so a program that computes the whole square has a lower MFU for it. Figures
of others that count the whole square (PaLM, MaxText before July 2025) are higher: by 4 to 13 % for the presets at their
own context.

Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B, with the causal half of attention.
"""

from gcompute.config.architecture import Architecture
from gcompute.plan.sizes import sizes


def kept_keys(seq: int, window: int | None) -> float:
    """Keys that a query sees on average: all before it and itself, or at most `window` of them.

    >>> kept_keys(4, None), kept_keys(4, 2)
    (2.5, 1.75)
    """
    if window is None or window >= seq:
        return (seq + 1) / 2
    return (window * (window + 1) / 2 + (seq - window) * window) / seq


def model_flops(model: Architecture, batch: int, seq: int) -> float:
    """Model FLOPs of one step of `batch` sequences of `seq` tokens; a multiply and its add are two.

    6 P tokens + 6 N (H + value) keys tokens per layer: P the parameters multiplied by (the output layer among them,
    tied or not; of experts, those that a token is sent to), keys as `kept_keys`.
    """
    attention = sum(
        6
        * group.num
        * group.attention.heads
        * (group.attention.head_dim + group.attention.value_size)
        * kept_keys(seq, group.attention.window)
        for group in model.layers
    )
    return batch * seq * (6 * sizes(model).matmul + attention)


def mfu(model: Architecture, batch: int, seq: int, step_s: float, peak_flops_per_s: float) -> float:
    """`model_flops` / (step_s peak), the peak that of all devices together.

    Raises:
      ValueError: the time or the peak is not above 0.
    """
    if step_s <= 0 or peak_flops_per_s <= 0:
        raise ValueError(f"step_s={step_s} and peak_flops_per_s={peak_flops_per_s} must both be above 0.")
    return model_flops(model, batch, seq) / (step_s * peak_flops_per_s)

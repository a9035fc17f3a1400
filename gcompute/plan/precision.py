"""Which dtype a device multiplies in, where a configuration leaves it to us."""

from collections.abc import Mapping

# bfloat16 must be at least so much faster: it also costs casts, and digits.
WORTH_IT = 1.1


def choose_precision(matmul_flops_per_s: Mapping[str, float]) -> tuple[str, str]:
    """The precision of matmul operands, "bfloat16" or "float32", for a device of these peaks, and the reason in words.

    bfloat16 where it is at least 1.1 times as fast, as on TPUs, GPUs and processors that multiply it; else float32.

    Args:
      matmul_flops_per_s: FLOP/s by dtype of the operands, measured or of a datasheet. One dtype alone is chosen; with
        neither there it is bfloat16.

    >>> choose_precision({"bfloat16": 48e9, "float32": 71e9})
    ('float32', 'matmuls: float32 71 GFLOP/s, bfloat16 48 GFLOP/s')
    """
    wide, narrow = matmul_flops_per_s.get("float32"), matmul_flops_per_s.get("bfloat16")
    if wide is None and narrow is None:
        return "bfloat16", "what accelerators multiply; their figures are not known"
    rates = [f"{name} {_rate(rate)}" for name, rate in (("float32", wide), ("bfloat16", narrow)) if rate is not None]
    chosen = "bfloat16" if narrow is not None and (wide is None or narrow >= WORTH_IT * wide) else "float32"
    return chosen, f"matmuls: {', '.join(rates)}"


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e9:,.0f} GFLOP/s" if flops_per_s < 1e12 else f"{flops_per_s / 1e12:,.0f} TFLOP/s"


def choose_residual(backend: str) -> tuple[str, str]:
    """The dtype of the residual stream on `backend`, and the reason in words."""
    if backend == "cpu":
        return "float32", "matmul results are float32 on CPU anyway"
    return "bfloat16", "half the memory and traffic, as most recipes have it"

"""The solution of exercise.py: weigh each piece by its tokens."""

import sys

import numpy as np
from check import check


def combine(losses: list[float], gradients: list[np.ndarray], num_tokens: list[int]) -> tuple[float, np.ndarray]:
    """sum_i n_i loss_i / sum_i n_i, and the same for the gradient: a mean of means counts each token once only so."""
    total = sum(num_tokens)
    loss = sum(n * loss for n, loss in zip(num_tokens, losses, strict=True)) / total
    gradient = sum(n * gradient for n, gradient in zip(num_tokens, gradients, strict=True)) / total
    return loss, gradient


if __name__ == "__main__":
    hint = check(combine)
    print(hint or "Right: the pieces give the loss and the gradient of the whole batch.")
    sys.exit(1 if hint else 0)

"""Exercise of lab 04: combine pieces of a batch that hold unequal numbers of tokens.

It is meant to fail until you solve it. Edit `combine`, then run: python labs/04_training/exercise.py
"""

import sys

import numpy as np
from check import check


def combine(losses: list[float], gradients: list[np.ndarray], num_tokens: list[int]) -> tuple[float, np.ndarray]:
    """The mean loss of the whole batch and its gradient, from those of its pieces.

    losses[i] is the mean loss over the num_tokens[i] tokens of piece i, and gradients[i] the gradient of that mean.
    """
    raise NotImplementedError


if __name__ == "__main__":
    hint = check(combine)
    print(hint or "Right: the pieces give the loss and the gradient of the whole batch.")
    sys.exit(1 if hint else 0)

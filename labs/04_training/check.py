"""The check of exercise 04: the pieces' answer against the whole batch computed at once, on pieces of unequal size."""

from collections.abc import Callable
from itertools import pairwise

import numpy as np

PIECES = ((3, 40, 11), (1, 2), (7,), (25, 1, 1, 60))  # tokens in each piece of a batch
UNSOLVED = "Not solved yet, and meant to fail until it is: write combine() in exercise.py, then run it again."


def loss_and_gradient(w: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean of (x w - y)^2 / 2 over the rows, and its gradient by w."""
    error = x @ w - y
    return float(np.mean(error**2) / 2), x.T @ error / len(y)


def check(combine: Callable[..., object]) -> str | None:
    """None if `combine` is right, else a hint at what is wrong with it."""
    random = np.random.default_rng(4)
    for sizes in PIECES:
        w, x, y = random.normal(size=5), random.normal(size=(sum(sizes), 5)), random.normal(size=sum(sizes))
        y[: sizes[0]] += 6  # the pieces must differ, or wrong weights would not show
        bounds = np.cumsum((0, *sizes))
        parts = [loss_and_gradient(w, x[a:b], y[a:b]) for a, b in pairwise(bounds)]
        losses, gradients = [loss for loss, _ in parts], [gradient for _, gradient in parts]
        try:
            answer = combine(list(losses), [gradient.copy() for gradient in gradients], list(sizes))
        except NotImplementedError:
            return UNSOLVED
        except Exception as error:
            return f"combine() stopped with {type(error).__name__}: {error} (pieces of {sizes} tokens)."
        hint = judge(answer, losses, gradients, sizes, expected=loss_and_gradient(w, x, y))
        if hint:
            return hint
    return None


def judge(
    answer: object,
    losses: list[float],
    gradients: list[np.ndarray],
    sizes: tuple[int, ...],
    *,
    expected: tuple[float, np.ndarray],
) -> str | None:
    """None for the right answer to one batch, else a hint."""
    if not isinstance(answer, tuple) or len(answer) != 2:
        return f"combine() must return two things, (loss, gradient), and returned {type(answer).__name__}."
    try:
        loss, gradient = np.asarray(answer[0], float), np.asarray(answer[1], float)
    except (TypeError, ValueError):
        return "The loss must be a number and the gradient an array of numbers."
    if loss.shape != ():
        return f"The loss must be one number, and has shape {loss.shape}: sum over the pieces."
    if gradient.shape != expected[1].shape:
        return f"The gradient must have the shape of each piece's, {expected[1].shape}, and has {gradient.shape}."
    right_loss, right_gradient = bool(np.isclose(loss, expected[0])), np.allclose(gradient, expected[1])
    if right_loss and right_gradient:
        return None
    if right_loss:
        return "The loss is right and the gradient is not: the same weights belong to both."
    if right_gradient:
        return "The gradient is right and the loss is not: the same weights belong to both."
    where = f"(pieces of {sizes} tokens)"
    weighted = sum(n * one for n, one in zip(sizes, losses, strict=True))
    if np.isclose(loss, np.mean(losses)):
        return f"Your mean counts each piece alike, so a token of a small piece weighs more than another {where}."
    if np.isclose(loss, sum(losses)):
        return f"A sum of means is no mean: it grows with the number of pieces {where}."
    if np.isclose(loss, weighted):
        return f"That is the sum over all tokens: divide by how many there are {where}."
    if np.isclose(loss, weighted / len(sizes)):
        return f"Right weights, but divide by the number of tokens, not of pieces {where}."
    return f"The loss should be {expected[0]:.4f} and is {float(loss):.4f} {where}."

"""A network small enough to differentiate by hand: once in jax.numpy to be sharded, once in numpy to be the truth."""

import jax.numpy as jnp
import numpy as np

ROWS, INPUTS, HIDDEN, OUTPUTS = 32, 6, 16, 4


def values(*, exact: bool, steps: int = 1):
    """Parameters and a batch for each step; small integers where sums are to be exact, else normal values."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.integers(-1, 2, shape).astype(np.float64) if exact else rng.normal(size=shape)

    params = {
        "into": {"w": draw(INPUTS, HIDDEN), "b": draw(HIDDEN)},
        "out": draw(HIDDEN, OUTPUTS),
        "scale": draw(OUTPUTS),  # eight devices do not divide it
    }
    return params, [{"x": draw(ROWS, INPUTS), "y": draw(ROWS, OUTPUTS)} for _ in range(steps)]


def loss_fn(params, batch, *, exact: bool = False):
    """Mean squared error of two layers; without the tanh between them where sums are to be exact."""
    hidden = batch["x"] @ params["into"]["w"] + params["into"]["b"]
    hidden = hidden if exact else jnp.tanh(hidden)
    return jnp.mean(((hidden @ params["out"]) * params["scale"] - batch["y"]) ** 2)


def loss_and_gradients(params, batch, *, exact: bool):
    """The same loss and its gradient, by hand, in numpy."""
    x, y, (w, b), out, scale = batch["x"], batch["y"], params["into"].values(), params["out"], params["scale"]
    hidden = x @ w + b if exact else np.tanh(x @ w + b)
    slope = 1.0 if exact else 1 - hidden**2
    error = (hidden @ out) * scale - y
    d_result = 2 * error / error.size
    d_product = d_result * scale
    d_hidden = (d_product @ out.T) * slope
    gradients = {
        "into": {"w": x.T @ d_hidden, "b": d_hidden.sum(0)},
        "out": hidden.T @ d_product,
        "scale": (d_result * (hidden @ out)).sum(0),
    }
    return np.mean(error**2), gradients


def leaves(tree):
    """[w, b, out, scale] of a tree of parameters, as numpy arrays."""
    return [np.asarray(x) for x in (tree["into"]["w"], tree["into"]["b"], tree["out"], tree["scale"])]


def tree_of(arrays):
    w, b, out, scale = arrays
    return {"into": {"w": w, "b": b}, "out": out, "scale": scale}


def train(params, batches, optimizer: str, *, exact: bool = False, clip: float | None = None, scale: float = 1.0):
    """Losses, and parameters after every step: "sgd" (0.0625, momentum 0.5) or "adamw" (0.01, decay 0.1), in numpy.

    Source: Loshchilov and Hutter 2019, "Decoupled weight decay regularization", algorithm 2.
    """
    p, losses = leaves(params), []
    first, second = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for step, batch in enumerate(batches, 1):
        loss, gradients = loss_and_gradients(tree_of(p), batch, exact=exact)
        g = [scale * x for x in leaves(gradients)]
        norm = np.sqrt(sum((x**2).sum() for x in g))
        if clip is not None and norm > clip:
            g = [x * clip / norm for x in g]
        losses.append(loss)
        if optimizer == "sgd":
            first = [0.5 * m + x for m, x in zip(first, g, strict=True)]
            p = [x - 0.0625 * m for x, m in zip(p, first, strict=True)]
        else:
            first = [0.9 * m + 0.1 * x for m, x in zip(first, g, strict=True)]
            second = [0.999 * v + 0.001 * x**2 for v, x in zip(second, g, strict=True)]
            unbiased = [(m / (1 - 0.9**step), v / (1 - 0.999**step)) for m, v in zip(first, second, strict=True)]
            p = [x - 0.01 * (m / (np.sqrt(v) + 1e-8) + 0.1 * x) for x, (m, v) in zip(p, unbiased, strict=True)]
    return losses, tree_of(p)

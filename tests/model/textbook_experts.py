"""A second mixture of experts, written only for tests: one token at a time in numpy, its gradients by hand."""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Textbook:
    """Results for x [B, T, D] and the gradients of sum(y * dy) + balance_weight * balance."""

    y: np.ndarray
    balance: float
    dropped: int
    load: np.ndarray
    grads: dict = field(default_factory=dict)


def textbook_mixture(x, weights, *, k, capacity, dy, balance_weight):
    """`weights`: router [D, E], up and gate [E, D, F] (no gate: a linear expert), down [E, F, D]; all float64."""
    router, up, gate, down = (weights.get(name) for name in ("router", "up", "gate", "down"))
    batch, length, _ = x.shape
    num_experts = router.shape[1]
    y, load, dropped, balance = np.zeros_like(x), np.zeros(num_experts, int), 0, 0.0
    grads = {name: np.zeros_like(value) for name, value in weights.items()} | {"x": np.zeros_like(x)}
    for b in range(batch):
        taken, wanted = np.zeros(num_experts, int), np.zeros(num_experts, int)
        probabilities, logit_grads = [], []
        for t in range(length):
            token, pull = x[b, t], dy[b, t]
            logits = token @ router
            p = np.exp(logits - logits.max())
            p /= p.sum()
            chosen = sorted(range(num_experts), key=lambda e, logits=logits: (-logits[e], e))[:k]
            w = p[chosen] / p[chosen].sum()
            dw = np.zeros(k)
            for rank, e in enumerate(chosen):
                wanted[e] += 1
                if taken[e] == capacity:
                    dropped += 1
                    continue
                taken[e] += 1
                u = token @ up[e]
                g = None if gate is None else token @ gate[e]
                s = 0.0 if gate is None else 1 / (1 + np.exp(-g))
                h = u if gate is None else g * s * u
                out = h @ down[e]
                y[b, t] += w[rank] * out
                dw[rank] = pull @ out
                dh = down[e] @ (w[rank] * pull)
                grads["down"][e] += np.outer(h, w[rank] * pull)
                du = dh if gate is None else dh * g * s
                grads["up"][e] += np.outer(token, du)
                grads["x"][b, t] += up[e] @ du
                if gate is not None:
                    dg = dh * u * (s + g * s * (1 - s))
                    grads["gate"][e] += np.outer(token, dg)
                    grads["x"][b, t] += gate[e] @ dg
            dlogits = np.zeros(num_experts)
            dlogits[chosen] = w * (dw - w @ dw)
            probabilities.append(p)
            logit_grads.append(dlogits)
        share, mean = wanted / (length * k), np.mean(probabilities, axis=0)
        balance += num_experts * (share @ mean) / batch
        dp = balance_weight * num_experts * share / (batch * length)
        for t in range(length):
            p = probabilities[t]
            dlogits = logit_grads[t] + p * (dp - p @ dp)
            grads["router"] += np.outer(x[b, t], dlogits)
            grads["x"][b, t] += router @ dlogits
        load += wanted
    return Textbook(y=y, balance=balance, dropped=dropped, load=load, grads=grads)

"""Causal attention and its gradients by the textbook: NumPy, one head at a time, no code shared with the library."""

import numpy as np


def causal_attention(q, k, v, do):
    """(o, dq, dk, dv) of q, do [b, t, N, H] and k, v [b, t, K, H], query head n using key/value head n // (N / K)."""
    b, t, num_heads, size = q.shape
    o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    visible = np.tril(np.ones((t, t), bool))
    for row in range(b):
        for n in range(num_heads):
            g = n // (num_heads // k.shape[2])
            s = np.where(visible, q[row, :, n] @ k[row, :, g].T / np.sqrt(size), -np.inf)
            w = np.exp(s - s.max(axis=1, keepdims=True))
            p = w / w.sum(axis=1, keepdims=True)
            o[row, :, n] = p @ v[row, :, g]
            dp = do[row, :, n] @ v[row, :, g].T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) / np.sqrt(size)
            dq[row, :, n] = ds @ k[row, :, g]
            dk[row, :, g] += ds.T @ q[row, :, n]
            dv[row, :, g] += p.T @ do[row, :, n]
    return o, dq, dk, dv

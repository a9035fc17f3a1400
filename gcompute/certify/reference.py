"""A second trainer, by the textbook: one sequence, one head, one expert at a time, gradients of that very program.

It exists to be believed. It shares no code with the library (a test reads its imports), takes nothing from it but the
configurations as data, and spends its lines on being obvious instead of fast. Everything runs in the dtype of `params`.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf
from jaxtyping import Array, Float, Int

from gcompute.config.model import ModelConfig
from gcompute.config.train import OptimizerConfig

Tree = dict[str, Any]


def norm(x: Array, p: Tree, config: ModelConfig) -> Array:
    """RMSNorm or LayerNorm over the last dim. Source: Zhang and Sennrich 2019, eq. 4; Ba et al. 2016, eq. 4."""
    if config.norm == "rmsnorm":
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(x.var(-1, keepdims=True) + config.norm_eps) * p["scale"] + p.get("bias", 0.0)


def rope(head_TH: Array, config: ModelConfig) -> Array:
    """Turn the pair (i, i + H/2) of position t by t / theta^(2i/H). Source: Su et al. 2021, equation 15."""
    length, size = head_TH.shape
    periods = jnp.array([config.rope_theta ** (2 * i / size) for i in range(size // 2)], head_TH.dtype)
    angles = jnp.arange(length)[:, None] / periods
    c, s = jnp.cos(angles), jnp.sin(angles)
    a, b = head_TH[:, : size // 2], head_TH[:, size // 2 :]
    return jnp.concatenate([a * c - b * s, b * c + a * s], axis=1)


def act(x: Array, config: ModelConfig) -> Array:
    """SiLU, GELU or its tanh form. Source: Hendrycks and Gimpel 2016, section 2."""
    if config.activation == "swiglu":
        return x / (1 + jnp.exp(-x))
    if config.activation == "gelu_tanh":
        return 0.5 * x * (1 + jnp.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + erf(x / 2**0.5))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last dim, from its largest value down."""
    weights = jnp.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attention(x_TD: Array, p: Tree, config: ModelConfig) -> Array:
    """Causal attention, a head at a time. Source: Vaswani et al. 2017, equation 1."""
    positions = jnp.arange(len(x_TD))
    later = positions[None] > positions[:, None]
    mixed = jnp.zeros_like(x_TD) + p.get("o_bias_D", 0.0)
    for n in range(config.heads):
        k = n // (config.heads // config.num_kv_heads)
        q_head = x_TD @ p["q_DNH"][:, n] + (p["q_bias_NH"][n] if "q_bias_NH" in p else 0.0)
        k_head = x_TD @ p["k_DKH"][:, k] + (p["k_bias_KH"][k] if "k_bias_KH" in p else 0.0)
        v_head = x_TD @ p["v_DKH"][:, k] + (p["v_bias_KH"][k] if "v_bias_KH" in p else 0.0)
        if config.qk_norm:
            q_head = q_head / jnp.sqrt((q_head**2).mean(-1, keepdims=True) + config.norm_eps) * p["q_norm"]["scale"]
            k_head = k_head / jnp.sqrt((k_head**2).mean(-1, keepdims=True) + config.norm_eps) * p["k_norm"]["scale"]
        if config.positions == "rope":
            q_head, k_head = rope(q_head, config), rope(k_head, config)
        s = q_head @ k_head.T / config.head_size**0.5
        mixed = mixed + softmax(jnp.where(later, -jnp.inf, s)) @ v_head @ p["o_NHD"][n]
    return mixed


def feed_forward(x_TD: Array, p: Tree, config: ModelConfig) -> Array:
    """down(act(up(x))), or down(act(gate(x)) * up(x)). Source: Shazeer 2020, equation 6."""
    up = x_TD @ p["up_DF"] + p.get("up_bias_F", 0.0)
    gated = config.activation == "swiglu"
    hidden = act(x_TD @ p["gate_DF"] + p.get("gate_bias_F", 0.0), config) * up if gated else act(up, config)
    return hidden @ p["down_FD"] + p.get("down_bias_D", 0.0)


def experts(x_TD: Array, p: Tree, config: ModelConfig) -> tuple[Array, Array, Array]:
    """The k best experts of each token, weighted; the balance loss; and how many choices found no place.

    An expert has ceil(T k / E factor) places, taken in the order of positions, a token's better choice first.
    Source: Jiang et al. 2024, section 2.1; Fedus et al. 2021, equations 2 and 4 to 6, over each sequence by itself.
    """
    length, k, num_experts = len(x_TD), config.experts_per_token, config.experts or 1
    logits_TE = x_TD @ p["router_DE"]
    probability_TE = softmax(logits_TE)
    chosen, left_TE = [], logits_TE
    for _ in range(k):
        best_T = left_TE.argmax(axis=1)
        chosen.append(best_T)
        left_TE = jnp.where(jnp.arange(num_experts) == best_T[:, None], -jnp.inf, left_TE)
    chosen_Tk = jnp.stack(chosen, axis=1)
    of_chosen_Tk = jnp.take_along_axis(logits_TE, chosen_Tk, axis=1)
    weight_Tk = softmax(of_chosen_Tk) if k > 1 else jnp.take_along_axis(probability_TE, chosen_Tk, axis=1)

    places = length
    if config.capacity_factor is not None:
        places = math.ceil(Fraction(str(config.capacity_factor)) * length * k / num_experts)
    queue = chosen_Tk.reshape(-1)
    before_me = jnp.arange(len(queue))[None] < jnp.arange(len(queue))[:, None]
    turn = ((queue[None] == queue[:, None]) & before_me).sum(axis=1)
    placed_Tk = (turn < places).reshape(length, k)

    y_TD, balance = jnp.zeros_like(x_TD), 0.0
    for e in range(num_experts):
        expert = {"up_DF": p["up_EDF"][e], "down_FD": p["down_EFD"][e]}
        if "gate_EDF" in p:
            expert["gate_DF"] = p["gate_EDF"][e]
        weight_T = jnp.where((chosen_Tk == e) & placed_Tk, weight_Tk, 0).sum(axis=1)
        y_TD = y_TD + weight_T[:, None] * feed_forward(x_TD, expert, config)
        share = (queue == e).sum() / len(queue)
        balance = balance + num_experts * share * probability_TE[:, e].mean()
    return y_TD, jnp.asarray(balance), (~placed_Tk).sum()


def layer_of(tree: Any, layer: int) -> Any:
    """One layer's parameters out of the stacked ones."""
    if isinstance(tree, dict):
        return {name: layer_of(value, layer) for name, value in tree.items()}
    return tree[layer]


def decoder(
    params: Tree, tokens: Int[Array, "t"], config: ModelConfig
) -> tuple[Float[Array, "t v"], Float[Array, ""], Int[Array, ""]]:
    """Logits at every position of one sequence, the sum of its layers' balance losses, and its dropped choices."""
    x = params["embedding_VD"][tokens]
    balance, dropped = jnp.zeros((), x.dtype), jnp.zeros((), int)
    if config.positions == "learned":
        x = x + params["positions_TD"][: len(tokens)]
    for layer in range(config.layers):
        p = layer_of(params["blocks"], layer)
        x = x + attention(norm(x, p["attention_norm"], config), p["attention"], config)
        h = norm(x, p["mlp_norm"], config)
        if config.experts:
            y, layer_balance, layer_dropped = experts(h, p["mlp"], config)
            x, balance, dropped = x + y, balance + layer_balance, dropped + layer_dropped
        else:
            x = x + feed_forward(h, p["mlp"], config)
    x = norm(x, params["norm"], config)
    return x @ (params["embedding_VD"].T if config.tied else params["head_DV"]), balance, dropped


def reference_logits(params: Tree, tokens: Int[Array, "t"], config: ModelConfig) -> Float[Array, "t v"]:
    """Logits of the next token at every position of one sequence."""
    return decoder(params, tokens, config)[0]


def reference_objective(
    params: Tree, inputs_BT: Int[Array, "b t"], targets_BT: Int[Array, "b t"], config: ModelConfig
) -> tuple[Float[Array, ""], tuple[Array, Array, Array]]:
    """What training minimises, loss + weight x balance, and its parts (loss, balance, dropped).

    loss: mean over all tokens of -log softmax(logits)[target], in nats. balance: mean over sequences.
    """

    def sequence(tokens: Array, targets: Array) -> tuple[Array, Array, Array]:
        logits, balance, dropped = decoder(params, tokens, config)
        highest = logits.max(axis=-1, keepdims=True)
        log_total = jnp.log(jnp.exp(logits - highest).sum(axis=-1, keepdims=True)) + highest
        return (log_total - logits)[jnp.arange(len(targets)), targets].mean(), balance, dropped

    losses, balances, dropped = jax.vmap(sequence)(inputs_BT, targets_BT)
    loss, balance = losses.mean(), balances.mean()
    return (loss + config.balance_weight * balance if config.experts else loss), (loss, balance, dropped.sum())


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0: a straight warm-up to the peak, then down to the floor.

    Source of "wsd", whose decay takes the last fifth: Hu et al. 2024 (MiniCPM), section 4.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.final_fraction
    steps = config.decay_steps or steps
    warmup = min(config.warmup(steps), steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    after = max(steps - warmup, 1)
    done = min((step - warmup) / after, 1.0)
    if config.schedule == "cosine":
        return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "linear":
        return peak + (floor - peak) * done
    if config.schedule == "wsd":
        tail = max(math.ceil(0.2 * after), 1)
        return peak + (floor - peak) * min(max((step - warmup - (after - tail)) / tail, 0.0), 1.0)
    return peak


def flat(tree: Tree, prefix: str = "") -> dict[str, np.ndarray]:
    """The leaves of a nested dict by their path, as in "blocks/mlp/up_DF"."""
    found: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        found |= flat(value, path) if isinstance(value, dict) else {path: np.asarray(value)}
    return found


def nested(leaves: dict[str, np.ndarray]) -> Tree:
    """The inverse of `flat`."""
    tree: Tree = {}
    for path, leaf in leaves.items():
        *above, name = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def global_norm(leaves: dict[str, np.ndarray]) -> float:
    """The root of the sum of all squares."""
    return math.sqrt(sum(float((leaf.astype(np.float64) ** 2).sum()) for leaf in leaves.values()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What the reference saw on its way; trees are flat, by path.

    losses, balances, dropped, norms: one value a step, the norm before clipping. gradients: of the first step, before
    clipping. first, last: parameters after one step and after all of them.
    """

    losses: np.ndarray
    balances: np.ndarray
    dropped: np.ndarray
    norms: np.ndarray
    gradients: dict[str, np.ndarray]
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]


def reference_training(
    params: Tree, inputs_NBT: np.ndarray, targets_NBT: np.ndarray, model: ModelConfig, optimizer: OptimizerConfig
) -> Trajectory:
    """N optimizer steps on N batches: AdamW or SGD with momentum, after clipping by the global norm.

    AdamW: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, with t steps done
    p -= rate (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p).
    SGD: m = b1 m + g, p -= rate (m + decay p). Biases and the scales of norms do not decay.
    Source: Loshchilov and Hutter 2019, algorithms 1 and 2; Sutskever et al. 2013, section 2; Pascanu et al. 2013,
    algorithm 1.

    Raises:
      ValueError: another optimizer.
    """
    if optimizer.optimizer not in ("adamw", "sgd"):
        raise ValueError(f"the reference has adamw and sgd, not {optimizer.optimizer!r}.")
    value_and_grad = jax.jit(jax.value_and_grad(partial(reference_objective, config=model), has_aux=True))
    p = flat(params)
    m, v = ({path: np.zeros_like(leaf) for path, leaf in p.items()} for _ in range(2))
    b1, b2, steps = optimizer.b1, optimizer.b2, len(inputs_NBT)
    parts, norms, gradients, first = [], [], {}, {}
    for step in range(steps):
        (_, of_step), tree = value_and_grad(nested(p), inputs_NBT[step], targets_NBT[step])
        g = flat(tree)
        parts.append([float(part) for part in of_step])
        norms.append(global_norm(g))
        gradients = gradients or g
        if optimizer.clip and norms[-1] > optimizer.clip:
            g = {path: leaf * (optimizer.clip / norms[-1]) for path, leaf in g.items()}
        rate = learning_rate(optimizer, step, steps)
        for path, leaf in p.items():
            name = path.rsplit("/", 1)[-1]
            decay = 0.0 if "bias" in name or name == "scale" else optimizer.weight_decay
            if optimizer.optimizer == "sgd":
                m[path] = b1 * m[path] + g[path]
                p[path] = leaf - rate * (m[path] + decay * leaf)
            else:
                m[path] = b1 * m[path] + (1 - b1) * g[path]
                v[path] = b2 * v[path] + (1 - b2) * g[path] ** 2
                root = np.sqrt(v[path] / (1 - b2 ** (step + 1))) + optimizer.eps
                p[path] = leaf - rate * (m[path] / (1 - b1 ** (step + 1)) / root + decay * leaf)
        first = first or dict(p)
    losses, balances, dropped = np.array(parts).T
    return Trajectory(
        losses=losses,
        balances=balances,
        dropped=dropped,
        norms=np.array(norms),
        gradients=gradients,
        first=first,
        last=p,
    )

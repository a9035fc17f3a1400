"""A second transformer, written only for tests: one sequence, one head at a time, no code shared with the library."""

import jax.numpy as jnp


def reference_logits(params, tokens, config):
    """Logits [T, V] of one sequence, by the textbook, in the dtype of `params`."""
    block_params = params["blocks"]
    x = params["embedding_VD"][tokens]
    length = len(tokens)
    if config.positions == "learned":
        x = x + params["positions_TD"][:length]

    def norm(values, p):
        if config.norm == "rmsnorm":
            return values / jnp.sqrt((values**2).mean(-1, keepdims=True) + config.norm_eps) * p["scale"]
        centred = values - values.mean(-1, keepdims=True)
        y = centred / jnp.sqrt(values.var(-1, keepdims=True) + config.norm_eps) * p["scale"]
        return y + p.get("bias", 0.0)

    def rope(head):
        if config.positions != "rope":
            return head
        half = head.shape[-1] // 2
        periods = jnp.array([config.rope_theta ** (2 * i / head.shape[-1]) for i in range(half)])
        c, s = jnp.cos(jnp.arange(length)[:, None] / periods), jnp.sin(jnp.arange(length)[:, None] / periods)
        a, b = head[:, :half], head[:, half:]
        return jnp.concatenate([a * c - b * s, b * c + a * s], axis=1)

    def act(values):
        if config.activation == "swiglu":
            return values / (1 + jnp.exp(-values))
        if config.activation == "gelu_tanh":
            return 0.5 * values * (1 + jnp.tanh((2 / jnp.pi) ** 0.5 * (values + 0.044715 * values**3)))
        from jax.scipy.special import erf

        return 0.5 * values * (1 + erf(values / 2**0.5))

    for layer in range(config.layers):
        p = {
            group: {name: value[layer] for name, value in values.items() if not isinstance(value, dict)}
            for group, values in block_params.items()
        }
        a = p["attention"]
        h = norm(x, p["attention_norm"])
        mixed = jnp.zeros_like(x) + a.get("o_bias_D", 0.0)
        for n in range(config.heads):
            k = n // (config.heads // config.num_kv_heads)
            q_head = h @ a["q_DNH"][:, n] + (a["q_bias_NH"][n] if "q_bias_NH" in a else 0.0)
            k_head = h @ a["k_DKH"][:, k] + (a["k_bias_KH"][k] if "k_bias_KH" in a else 0.0)
            v_head = h @ a["v_DKH"][:, k] + (a["v_bias_KH"][k] if "v_bias_KH" in a else 0.0)
            if config.qk_norm:
                scale = {name: block_params["attention"][name]["scale"][layer] for name in ("q_norm", "k_norm")}
                q_head = q_head / jnp.sqrt((q_head**2).mean(-1, keepdims=True) + config.norm_eps) * scale["q_norm"]
                k_head = k_head / jnp.sqrt((k_head**2).mean(-1, keepdims=True) + config.norm_eps) * scale["k_norm"]
            q_head, k_head = rope(q_head), rope(k_head)
            s = q_head @ k_head.T / config.head_size**0.5
            s = jnp.where(jnp.arange(length)[None] > jnp.arange(length)[:, None], -jnp.inf, s)
            w = jnp.exp(s - s.max(axis=1, keepdims=True))
            mixed = mixed + (w / w.sum(axis=1, keepdims=True)) @ v_head @ a["o_NHD"][n]
        x = x + mixed
        m = p["mlp"]
        h = norm(x, p["mlp_norm"])
        up = h @ m["up_DF"] + m.get("up_bias_F", 0.0)
        hidden = act(h @ m["gate_DF"] + m.get("gate_bias_F", 0.0)) * up if config.activation == "swiglu" else act(up)
        x = x + hidden @ m["down_FD"] + m.get("down_bias_D", 0.0)
    x = norm(x, params["norm"])
    return x @ (params["embedding_VD"].T if config.tied else params["head_DV"])

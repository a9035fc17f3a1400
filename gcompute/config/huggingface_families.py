"""Readers of a Hugging Face config.json, one for each family of `model_type`: from a file's fields to an architecture.

Where a file leaves a field away, the default of its class counts, as transformers has it; sizes that make a model what
it is, such as hidden_size, have to be there.

Source: transformers, `models/*/configuration_*.py` and `modeling_*.py`, 2026.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers
from gcompute.config.fields import nearest

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh")
# No model has a size like this; such a number is a slip of the hand.
MOST = 10**9
FULL, SLIDING = "full_attention", "sliding_attention"


class Fields:
    """A config.json's fields; remembers which were read."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source
        self.used: set[str] = set()

    @property
    def kind(self) -> str:
        return str(self.values.get("model_type"))

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def read(self, *names: str) -> None:
        """Count fields as read that mean nothing in this file."""
        self.used.update(names)

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.source}: {message}")

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`; `default` where it is absent or null."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise self.error(f"{name} is absent, and a {self.kind} model needs it.")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MOST:
            raise self.error(f"{name} must be a whole number of {least} to {MOST}, got {value!r}.")
        return value

    def whole_or_null(self, name: str, default: int | None) -> int | None:
        """A whole number, None where the file says null; `default` where it lacks the field."""
        self.used.add(name)
        return default if name not in self.values else self.whole(name) if self.has(name) else None

    def positive(self, name: str, default: float) -> float:
        self.used.add(name)
        return positive(self.values.get(name, default), f"{self.source}: {name}")

    def flag(self, name: str, default: bool) -> bool:
        self.used.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.error(f"{name} must be true or false, got {value!r}.")
        return default if value is None else value

    def choice(self, name: str, default: str, legal: tuple[str, ...]) -> str:
        self.used.add(name)
        value = self.values.get(name)
        if value is not None and value not in legal:
            raise self.error(f"{name}={value!r} is not known. {nearest(str(value), legal)}")
        return default if value is None else value


def positive(value: Any, name: str) -> float:
    """`value` as a number above 0, or a ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0, got {value!r}.")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a class of transformers takes for fields that a file lacks. None: it follows from others, or has to be
    given; no window."""

    context: int
    vocab: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    tied: bool = False


GEMMA3 = Defaults(context=131072, vocab=262208, heads=8, kv_heads=4, head_dim=256, window=4096, tied=True)
DEFAULTS = {
    "llama": Defaults(context=2048),
    "mistral": Defaults(context=131072, kv_heads=8, window=4096),
    "qwen2": Defaults(context=32768, kv_heads=32, window=4096),
    "qwen3": Defaults(context=32768, kv_heads=32, head_dim=128, window=4096),
    "gemma": Defaults(context=8192, kv_heads=16, head_dim=256, tied=True),
    "gemma2": Defaults(context=8192, kv_heads=4, head_dim=256, window=4096, tied=True),
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "mixtral": Defaults(context=131072, kv_heads=8),
    "qwen2_moe": Defaults(context=32768, kv_heads=16, window=4096),
    "qwen3_moe": Defaults(context=32768, kv_heads=4, window=4096),
    "deepseek_v2": Defaults(context=2048),
    "deepseek_v3": Defaults(context=4096),
}


def activation(fields: Fields) -> str:
    """The name of the nonlinearity."""
    if fields.kind == "gpt2":
        return fields.choice("activation_function", "gelu_new", (*ACTIVATIONS, "relu"))
    gemma = fields.kind.startswith("gemma")
    name = "hidden_activation" if fields.has("hidden_activation") else "hidden_act"
    return fields.choice(name, "gelu_pytorch_tanh" if gemma else "silu", ACTIVATIONS)


def _gpt2(fields: Fields) -> Architecture:
    dim, heads = fields.whole("n_embd"), fields.whole("n_head")
    if dim % heads:
        raise fields.error(f"n_embd={dim} does not divide into n_head={heads} heads.")
    activation(fields)
    attention = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, bias=True, output_bias=True)
    fed = FeedForward(width=fields.whole("n_inner", 4 * dim), gated=False, bias=True)
    return Architecture(
        name=fields.source,
        vocab=fields.whole("vocab_size"),
        dim=dim,
        layers=(Layers(num=fields.whole("n_layer"), attention=attention, feed_forward=fed),),
        context=fields.whole("n_positions", fields.whole("n_ctx", 1024)),
        tied=fields.flag("tie_word_embeddings", True),
        learned_positions=True,
        norm_bias=True,
    )


def _dense(fields: Fields) -> Architecture:
    """Llama, Mistral, Qwen2, Qwen3 and Gemma: one gated network a layer."""
    kind = fields.kind
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"):
        if fields.has(name):
            raise fields.error(f"{name} contradicts model_type {kind!r}, which has no such part.")
    attention = _attention(
        fields,
        window=fields.whole_or_null("sliding_window", DEFAULTS[kind].window) if kind == "mistral" else None,
        qkv_bias=kind == "qwen2",
        both_bias=kind not in ("mistral", "qwen2") and fields.flag("attention_bias", False),
        qk_norm=kind in ("qwen3", "gemma3", "gemma3_text"),
    )
    fed = _gated(fields, bias=kind == "llama" and fields.flag("mlp_bias", False))
    windowed = kind in ("qwen2", "qwen3", "gemma2", "gemma3", "gemma3_text")
    norms = 4 if kind in ("gemma2", "gemma3", "gemma3_text") else 2
    return _decoder(fields, _layers(fields, attention, fed, windowed=windowed), norms_per_layer=norms)


def _mixture(fields: Fields) -> Architecture:
    """Mixtral and the mixtures of Qwen: every layer the same experts, of Qwen2 with one that all tokens go through,
    whose gate of D values is not counted."""
    kind = fields.kind
    name = "num_local_experts" if kind == "mixtral" or fields.has("num_local_experts") else "num_experts"
    experts = fields.whole(name)
    each = fields.whole("num_experts_per_tok", 2 if kind == "mixtral" else None)
    if each > experts:
        raise fields.error(f"num_experts_per_tok={each} is more than {name}={experts}.")
    if kind != "mixtral":
        fields.read("intermediate_size", "mlp_only_layers")  # the width of layers without experts: there are none
        if fields.whole("decoder_sparse_step", 1) != 1 or fields.values.get("mlp_only_layers"):
            raise fields.error("layers without experts (decoder_sparse_step, mlp_only_layers) are not known here.")
    attention = _attention(
        fields,
        window=fields.whole_or_null("sliding_window", None) if kind == "mixtral" else None,
        qkv_bias=kind == "qwen2_moe" and fields.flag("qkv_bias", True),
        both_bias=kind == "qwen3_moe" and fields.flag("attention_bias", False),
        qk_norm=kind == "qwen3_moe",
    )
    activation(fields)
    fed = FeedForward(
        width=fields.whole("intermediate_size" if kind == "mixtral" else "moe_intermediate_size"),
        gated=True,
        experts=experts,
        experts_per_token=each,
        shared_width=fields.whole("shared_expert_intermediate_size", least=0) if kind == "qwen2_moe" else 0,
        capacity_factor=1.0,
    )
    return _decoder(fields, _layers(fields, attention, fed, windowed=kind != "mixtral"))


def _deepseek(fields: Fields) -> Architecture:
    """DeepSeek-V2 and V3: latent attention, the first layers dense, then experts beside shared ones."""
    heads = fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if kv_heads != heads:
        raise fields.error(
            f"num_key_value_heads={kv_heads} contradicts latent attention, whose num_attention_heads={heads} each have"
            " keys of their own."
        )
    if "q_lora_rank" not in fields.values:
        raise fields.error("q_lora_rank is absent. Give null where queries are not made from a latent vector.")
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name, False):
            raise fields.error(f"{name}=true is not known here for a {fields.kind} model. Legal: false.")
    rope = fields.whole("qk_rope_head_dim")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=fields.whole("qk_nope_head_dim") + rope,
        value_dim=fields.whole("v_head_dim"),
        q_rank=fields.whole_or_null("q_lora_rank", None),
        kv_rank=fields.whole("kv_lora_rank"),
        rope_dim=rope,
    )
    num, dense = fields.whole("num_hidden_layers"), fields.whole("first_k_dense_replace", 0, least=0)
    if dense > num:
        raise fields.error(f"first_k_dense_replace={dense} is more than num_hidden_layers={num}.")
    every = fields.whole("moe_layer_freq", 1)
    if every != 1:
        raise fields.error(f"moe_layer_freq={every} is not known here. Legal: 1.")
    experts, each = fields.whole("n_routed_experts"), fields.whole("num_experts_per_tok")
    if each > experts:
        raise fields.error(f"num_experts_per_tok={each} is more than n_routed_experts={experts}.")
    width = fields.whole("moe_intermediate_size")
    mixture = FeedForward(
        width=width,
        gated=True,
        experts=experts,
        experts_per_token=each,
        capacity_factor=1.0,
        shared_width=width * fields.whole("n_shared_experts", 0, least=0),
    )
    # head_dim repeats qk_rope_head_dim. The layers that predict a token further ahead are trained with, and left away
    # from the model that is served.
    fields.read("head_dim", "qk_head_dim", "num_nextn_predict_layers")
    fed = _gated(fields)
    groups = [Layers(num=dense, attention=attention, feed_forward=fed)] if dense else []
    groups += [Layers(num=num - dense, attention=attention, feed_forward=mixture)] if num > dense else []
    return _decoder(fields, tuple(groups))


def _attention(fields: Fields, *, window: int | None, qkv_bias: bool, both_bias: bool, qk_norm: bool) -> Attention:
    default = DEFAULTS[fields.kind]
    dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads", default.heads)
    kv_heads = fields.whole_or_null("num_key_value_heads", default.kv_heads) or heads
    if heads % kv_heads:
        raise fields.error(
            f"num_attention_heads={heads} do not group over num_key_value_heads={kv_heads}: it must divide them."
        )
    head_dim = fields.whole_or_null("head_dim", default.head_dim)
    if head_dim is None and dim % heads:
        raise fields.error(
            f"hidden_size={dim} does not divide into num_attention_heads={heads} heads, and head_dim is absent."
        )
    head_dim = head_dim or dim // heads
    if head_dim % 2:
        raise fields.error(f"RoPE rotates pairs, so head_dim must be even, got {head_dim}.")
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        window=window,
        bias=qkv_bias or both_bias,
        output_bias=both_bias,
        qk_norm=qk_norm,
    )


def _gated(fields: Fields, *, bias: bool = False) -> FeedForward:
    activation(fields)
    return FeedForward(width=fields.whole("intermediate_size"), gated=True, bias=bias)


def _layers(fields: Fields, attention: Attention, fed: FeedForward, *, windowed: bool) -> tuple[Layers, ...]:
    """The layers in groups that are alike: those that see all tokens, and those that see a window."""
    num = fields.whole("num_hidden_layers")
    local = _num_local(fields, num) if windowed else 0
    groups = [Layers(num=num - local, attention=attention, feed_forward=fed)] if num > local else []
    if local:
        window = fields.whole_or_null("sliding_window", DEFAULTS[fields.kind].window)
        if window is None:
            raise fields.error(f"sliding_window is null, and {local} of {num} layers see a window.")
        seeing = dataclasses.replace(attention, window=window)
        groups.append(Layers(num=local, attention=seeing, feed_forward=fed))
    return tuple(groups)


def _num_local(fields: Fields, num: int) -> int:
    """How many layers see a window only: as `layer_types` lists them, else by the family's own rule."""
    kind, types = fields.kind, fields.values.get("layer_types")
    fields.read("layer_types", "sliding_window")
    by_switch = kind.startswith("qwen")
    switched_on = by_switch and fields.flag("use_sliding_window", False)
    first = fields.whole("max_window_layers", 28, least=0) if by_switch else 0
    gemma3 = kind in ("gemma3", "gemma3_text")
    full_every = fields.whole("sliding_window_pattern", fields.whole("_sliding_window_pattern", 6)) if gemma3 else 2
    if types is not None:
        if not isinstance(types, list) or len(types) != num:
            held = f"{len(types)}" if isinstance(types, list) else repr(types)
            raise fields.error(f"layer_types must list num_hidden_layers={num} layers, got {held}.")
        unknown = [one for one in types if one not in (FULL, SLIDING)]
        if unknown:
            raise fields.error(f"layer_types holds {unknown[0]!r}. Legal: {FULL}, {SLIDING}.")
        if by_switch and not switched_on and SLIDING in types:
            raise fields.error(f"layer_types holds {SLIDING}, and use_sliding_window=false contradicts it.")
        return types.count(SLIDING)
    if by_switch:
        if not switched_on or ("sliding_window" in fields.values and not fields.has("sliding_window")):
            return 0
        # Qwen2-MoE: every other one of the first layers. Qwen3-MoE: all. The dense ones: all after the first.
        rules = {"qwen2_moe": (min(first, num) + 1) // 2, "qwen3_moe": num}
        return rules.get(kind, max(0, num - first))
    return num - num // full_every


def _decoder(fields: Fields, layers: tuple[Layers, ...], *, norms_per_layer: int = 2) -> Architecture:
    default = DEFAULTS[fields.kind]
    return Architecture(
        name=fields.source,
        vocab=fields.whole("vocab_size", default.vocab),
        dim=fields.whole("hidden_size"),
        layers=layers,
        context=fields.whole("max_position_embeddings", default.context),
        tied=fields.flag("tie_word_embeddings", default.tied),
        norms_per_layer=norms_per_layer,
    )


READERS: dict[str, Callable[[Fields], Architecture]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text"), _dense),
    "gpt2": _gpt2,
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _mixture),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _deepseek),
}

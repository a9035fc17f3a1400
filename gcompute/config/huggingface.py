"""Read a Hugging Face config.json as an architecture that can be planned, and where it can be, as a model to train.

Every field is either used, known to change neither sizes nor operations, or named in `unused`: nothing is ignored in
silence.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers
from gcompute.config.fields import nearest
from gcompute.config.model import ModelConfig

# They change neither the number of parameters nor of operations: names, tokens, initial values, dropout, rotation.
WITHOUT_EFFECT = {
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "image_token_index", "boi_token_index", "eoi_token_index"),
    *("initializer_range", "initializer_factor", "use_cache", "pretraining_tp", "task_specific_params", "_commit_hash"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "dropout", "summary_type"),
    *(
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "reorder_and_upcast_attn",
    ),
    *("rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "rms_norm_eps", "layer_norm_epsilon"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx", "query_pre_attn_scalar", "attn_logit_softcapping"),
    *(
        "final_logit_softcapping",
        "router_aux_loss_coef",
        "output_router_logits",
        "router_jitter_noise",
        "norm_topk_prob",
    ),
    *("aux_loss_alpha", "seq_aux", "scoring_func", "topk_method", "n_group", "topk_group", "routed_scaling_factor"),
    *("ep_size", "quantization_config", "use_bidirectional_attention", "cache_implementation", "rope_interleave"),
    *("hidden_activation", "hidden_act", "activation_function", "tie_word_embeddings", "is_encoder_decoder"),
    *("n_ctx", "mlp_only_layers", "output_hidden_states", "output_attentions", "return_dict", "name_or_path"),
    *(
        "qk_head_dim",
        "head_dim_",
        "id2label",
        "label2id",
        "problem_type",
        "chunk_size_feed_forward",
        "gradient_checkpointing",
    ),
}
GATED = {"silu", "swish", "gelu_pytorch_tanh", "gelu"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceModel:
    """What a config.json says. trainable: the same as a model of this library, None where that has no such model, for
    the reason in `why_not`. unused: fields that this reader does not know, by name."""

    architecture: Architecture
    trainable: ModelConfig | None
    why_not: str
    unused: tuple[str, ...]


class _Fields:
    """A config.json's fields; remembers which were read."""

    def __init__(self, values: Mapping[str, Any], source: str):
        self.values = values
        self.source = source
        self.used: set[str] = set()

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def whole(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least `least`."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"{self.source}: {name} is absent, and a {self.kind} model needs it.")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{self.source}: {name} must be a whole number of at least {least}, got {value!r}.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        self.used.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{self.source}: {name} must be true or false, got {value!r}.")
        return default if value is None else value

    def text(self, name: str, default: str) -> str:
        self.used.add(name)
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.source}: {name} must be a text, got {value!r}.")
        return value or default

    @property
    def kind(self) -> str:
        return str(self.values.get("model_type"))


def is_huggingface(values: Any) -> bool:
    """Whether the values of a config.json are in Hugging Face's form and not in ours."""
    return isinstance(values, Mapping) and ("model_type" in values or "architectures" in values)


def read_huggingface(path: Path) -> HuggingFaceModel:
    """The model that the config.json at `path` describes.

    Raises:
      ValueError: the file cannot be read, its kind of model is not known, or a field is lacking or contradicts another.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"model file {path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ValueError(f"model file {path} does not parse: {error}.") from None
    return from_huggingface(values, source=str(path))


def from_huggingface(values: Any, *, source: str) -> HuggingFaceModel:
    """As `read_huggingface`, from the file's values.

    >>> small = dict(model_type="llama", hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...              intermediate_size=128, vocab_size=100)
    >>> from_huggingface(small, source="here").architecture.num_layers
    2
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{source}: fields and their values are wanted, got {values!r}.")
    inner = values.get("text_config")
    if isinstance(inner, Mapping) and "hidden_size" not in values:
        # A model of text and pictures: its decoder alone is planned.
        outer = tuple(sorted(set(values) - WITHOUT_EFFECT - {"text_config"}))
        kind = inner.get("model_type") or str(values.get("model_type"))
        tied = {"tie_word_embeddings": values["tie_word_embeddings"]} if "tie_word_embeddings" in values else {}
        found = from_huggingface({**tied, **inner, "model_type": kind}, source=source)
        return HuggingFaceModel(
            architecture=found.architecture,
            trainable=None,
            why_not="it reads pictures too",
            unused=(*outer, *found.unused),
        )
    kind = values.get("model_type")
    if kind is None:
        raise ValueError(f"{source}: model_type is absent. Legal: {', '.join(READERS)}.")
    if kind not in READERS:
        raise ValueError(f"{source}: model_type {kind!r} is not known. {nearest(str(kind), READERS)}")
    fields = _Fields(values, source)
    model = READERS[kind](fields)
    unused = tuple(sorted(set(values) - fields.used - WITHOUT_EFFECT))
    trainable, why_not = _trainable(model, fields)
    return HuggingFaceModel(architecture=model, trainable=trainable, why_not=why_not, unused=unused)


def _gpt2(fields: _Fields) -> Architecture:
    dim, heads = fields.whole("n_embd"), fields.whole("n_head")
    if dim % heads:
        raise ValueError(f"{fields.source}: n_embd={dim} does not divide into n_head={heads} heads.")
    attention = Attention(heads=heads, kv_heads=heads, head_dim=dim // heads, bias=True, output_bias=True)
    width = fields.whole("n_inner", 4 * dim)
    context = fields.whole("n_positions", fields.whole("n_ctx", 1024))
    return Architecture(
        name=fields.source,
        vocab=fields.whole("vocab_size"),
        dim=dim,
        layers=(
            Layers(
                num=fields.whole("n_layer"),
                attention=attention,
                feed_forward=FeedForward(width=width, gated=False, bias=True),
            ),
        ),
        context=context,
        tied=fields.flag("tie_word_embeddings", True),
        learned_positions=True,
        norm_bias=True,
    )


def _attention(fields: _Fields, *, window: int | None = None, bias: bool = False, qk_norm: bool = False) -> Attention:
    dim, heads = fields.whole("hidden_size"), fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ValueError(
            f"{fields.source}: num_attention_heads={heads} do not group over num_key_value_heads={kv_heads}: it must"
            " divide them."
        )
    if not fields.has("head_dim") and dim % heads:
        raise ValueError(
            f"{fields.source}: hidden_size={dim} does not divide into num_attention_heads={heads} heads, and head_dim"
            " is absent."
        )
    both = fields.flag("attention_bias", False)
    return Attention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=fields.whole("head_dim", dim // heads),
        window=window,
        bias=bias or both,
        output_bias=both,
        qk_norm=qk_norm,
    )


def _decoder(
    fields: _Fields,
    layers: tuple[Layers, ...],
    *,
    context: int = 2048,
    tied: bool = False,
    norms_per_layer: int = 2,
) -> Architecture:
    return Architecture(
        name=fields.source,
        vocab=fields.whole("vocab_size"),
        dim=fields.whole("hidden_size"),
        layers=layers,
        context=fields.whole("max_position_embeddings", context),
        tied=fields.flag("tie_word_embeddings", tied),
        norms_per_layer=norms_per_layer,
    )


def _gated(fields: _Fields) -> FeedForward:
    act = fields.text("hidden_act", fields.text("hidden_activation", "silu"))
    if act not in GATED:
        raise ValueError(f"{fields.source}: hidden_act {act!r} is not known. {nearest(act, sorted(GATED))}")
    return FeedForward(width=fields.whole("intermediate_size"), gated=True, bias=fields.flag("mlp_bias", False))


def _llama(fields: _Fields) -> Architecture:
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "kv_lora_rank"):
        if fields.has(name):
            raise ValueError(f"{fields.source}: {name} contradicts model_type {fields.kind!r}, which has no such part.")
    qwen2, mistral = fields.kind == "qwen2", fields.kind == "mistral"
    window = fields.whole("sliding_window") if mistral and fields.has("sliding_window") else None
    attention = _attention(fields, window=window, bias=qwen2, qk_norm=fields.kind == "qwen3")
    if not mistral:
        layers = _windowed(fields, attention, _gated(fields))
    else:
        layers = (Layers(num=fields.whole("num_hidden_layers"), attention=attention, feed_forward=_gated(fields)),)
    return _decoder(fields, layers)


def _windowed(fields: _Fields, attention: Attention, fed: FeedForward) -> tuple[Layers, ...]:
    """The layers of a model in which `layer_types`, or a pattern, say which of them see a window only."""
    import dataclasses

    num = fields.whole("num_hidden_layers")
    types = fields.values.get("layer_types")
    fields.used |= {
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "max_window_layers",
        "sliding_window_pattern",
    }
    fields.used |= {"_sliding_window_pattern"}
    pattern = fields.values.get("sliding_window_pattern") or fields.values.get("_sliding_window_pattern")
    local = 0
    if types is not None:
        if not isinstance(types, list) or len(types) != num:
            raise ValueError(f"{fields.source}: layer_types must list num_hidden_layers={num} layers.")
        unknown = sorted({str(kind) for kind in types} - {"full_attention", "sliding_attention"})
        if unknown:
            raise ValueError(
                f"{fields.source}: layer_types holds {unknown[0]!r}. Legal: full_attention, sliding_attention."
            )
        local = types.count("sliding_attention")
    elif fields.kind == "gemma2":
        local = num - num // 2
    elif fields.kind in ("gemma3", "gemma3_text"):
        every = pattern if isinstance(pattern, int) and pattern > 0 else 6
        local = num - num // every
    elif fields.flag("use_sliding_window", False) and fields.has("sliding_window"):
        local = max(0, num - fields.whole("max_window_layers", 0, least=0))
    groups = []
    if num - local:
        groups.append(Layers(num=num - local, attention=attention, feed_forward=fed))
    if local:
        window = dataclasses.replace(attention, window=fields.whole("sliding_window"))
        groups.append(Layers(num=local, attention=window, feed_forward=fed))
    return tuple(groups)


def _gemma(fields: _Fields) -> Architecture:
    third = fields.kind in ("gemma3", "gemma3_text")
    attention = _attention(fields, qk_norm=third)
    if fields.kind == "gemma":
        layers = (Layers(num=fields.whole("num_hidden_layers"), attention=attention, feed_forward=_gated(fields)),)
        return _decoder(fields, layers, context=8192, tied=True)
    layers = _windowed(fields, attention, _gated(fields))
    return _decoder(fields, layers, context=131072 if third else 8192, tied=True, norms_per_layer=4)


def _mixture(fields: _Fields) -> Architecture:
    """Mixtral and the mixtures of Qwen: every layer the same experts, of Qwen2 with one that all tokens go through."""
    mixtral = fields.kind == "mixtral"
    experts = fields.whole("num_local_experts" if mixtral else "num_experts")
    each = fields.whole("num_experts_per_tok", 2 if mixtral else None)
    if each > experts:
        raise ValueError(f"{fields.source}: num_experts_per_tok={each} is more than the {experts} experts.")
    width = fields.whole("intermediate_size") if mixtral else fields.whole("moe_intermediate_size")
    shared = fields.whole("shared_expert_intermediate_size", least=0) if fields.kind == "qwen2_moe" else 0
    if not mixtral:
        # Given beside the experts' own width, and used by layers without experts, of which there are none.
        fields.used.add("intermediate_size")
        if fields.whole("decoder_sparse_step", 1) != 1 or fields.values.get("mlp_only_layers"):
            raise ValueError(
                f"{fields.source}: layers without experts (decoder_sparse_step, mlp_only_layers) are not known here."
            )
    window = fields.whole("sliding_window") if mixtral and fields.has("sliding_window") else None
    fields.used |= {"use_sliding_window", "max_window_layers", "sliding_window"}
    attention = _attention(fields, window=window, bias=fields.kind == "qwen2_moe", qk_norm=fields.kind == "qwen3_moe")
    fed = FeedForward(
        width=width, gated=True, experts=experts, experts_per_token=each, shared_width=shared, capacity_factor=1.0
    )
    layers = (Layers(num=fields.whole("num_hidden_layers"), attention=attention, feed_forward=fed),)
    return _decoder(fields, layers)


def _deepseek(fields: _Fields) -> Architecture:
    """DeepSeek-V2 and V3: latent attention, the first layers dense, then experts beside shared ones."""
    heads = fields.whole("num_attention_heads")
    kv_heads = fields.whole("num_key_value_heads", heads)
    if kv_heads != heads:
        raise ValueError(
            f"{fields.source}: num_key_value_heads={kv_heads} contradicts latent attention, whose"
            f" num_attention_heads={heads} each have keys of their own."
        )
    rope = fields.whole("qk_rope_head_dim")
    attention = Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=fields.whole("qk_nope_head_dim") + rope,
        value_dim=fields.whole("v_head_dim"),
        q_rank=fields.whole("q_lora_rank") if fields.has("q_lora_rank") else None,
        kv_rank=fields.whole("kv_lora_rank"),
        rope_dim=rope,
        bias=False,
        output_bias=fields.flag("attention_bias", False),
    )
    fields.used |= {"q_lora_rank", "head_dim"}
    num, dense = fields.whole("num_hidden_layers"), fields.whole("first_k_dense_replace", 0, least=0)
    if dense > num:
        raise ValueError(f"{fields.source}: first_k_dense_replace={dense} is more than num_hidden_layers={num}.")
    if fields.whole("moe_layer_freq", 1) != 1:
        raise ValueError(f"{fields.source}: moe_layer_freq above 1 is not known here.")
    experts, each = fields.whole("n_routed_experts"), fields.whole("num_experts_per_tok")
    if each > experts:
        raise ValueError(f"{fields.source}: num_experts_per_tok={each} is more than n_routed_experts={experts}.")
    width = fields.whole("moe_intermediate_size")
    mixture = FeedForward(
        width=width,
        gated=True,
        experts=experts,
        experts_per_token=each,
        capacity_factor=1.0,
        shared_width=width * fields.whole("n_shared_experts", 0, least=0),
    )
    # Layers that predict a token further ahead: they are trained with, and left away from the model that is served.
    fields.used.add("num_nextn_predict_layers")
    groups = [Layers(num=dense, attention=attention, feed_forward=_gated(fields))] if dense else []
    groups += [Layers(num=num - dense, attention=attention, feed_forward=mixture)] if num > dense else []
    return _decoder(fields, tuple(groups), context=4096)


READERS: dict[str, Callable[[_Fields], Architecture]] = {
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _llama,
    "qwen3": _llama,
    "gemma": _gemma,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "gpt2": _gpt2,
    "mixtral": _mixture,
    "qwen2_moe": _mixture,
    "qwen3_moe": _mixture,
    "deepseek_v2": _deepseek,
    "deepseek_v3": _deepseek,
}


def _trainable(model: Architecture, fields: _Fields) -> tuple[ModelConfig | None, str]:
    """The same as a model that this library trains, or why there is none."""
    if len(model.layers) > 1:
        return None, "its layers are of several kinds"
    attention, fed = model.layers[0].attention, model.layers[0].feed_forward
    reasons = {
        "latent attention": attention.kv_rank is not None,
        "attention in a window": attention.window is not None and attention.window < model.context,
        "biases of queries, keys and values alone": attention.bias != (fed.bias and attention.output_bias),
        "shared experts": bool(fed.shared_width),
        "four norms a layer": model.norms_per_layer != 2,
        "GELU that gates": fields.kind == "gemma",
    }
    for reason, holds in reasons.items():
        if holds:
            return None, f"it has {reason}"
    theta, eps = fields.values.get("rope_theta"), fields.values.get("rms_norm_eps")
    gpt2 = fields.kind == "gpt2"
    return ModelConfig(
        vocab=model.vocab,
        layers=model.num_layers,
        dim=model.dim,
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        ffn=fed.width,
        context=model.context,
        norm="layernorm" if gpt2 else "rmsnorm",
        norm_eps=float(eps) if isinstance(eps, int | float) else 1e-5,
        positions="learned" if gpt2 else "rope",
        rope_theta=float(theta) if isinstance(theta, int | float) else 10000.0,
        activation="gelu_tanh" if gpt2 else "swiglu",
        bias=gpt2,
        tied=model.tied,
        qk_norm=attention.qk_norm,
        experts=fed.experts,
        experts_per_token=fed.experts_per_token if fed.experts else 2,
        capacity_factor=fed.capacity_factor,
    ), ""

"""Read a Hugging Face config.json as an architecture that can be planned, and where it can be, as a model to train.

Every field is either used, known to change neither sizes nor operations, or named in `unused`: nothing is ignored in
silence. `huggingface_families` says what each kind of model makes of its fields.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcompute.config.architecture import Architecture
from gcompute.config.fields import nearest
from gcompute.config.huggingface_families import READERS, Fields, activation, positive
from gcompute.config.model import ModelConfig

# They change neither the number of parameters nor of operations: names and formats; tokens; initial values and dropout;
# norms, rotation, scales and limits of scores; how experts are chosen and their losses; what is read where it counts.
WITHOUT_EFFECT = """
architectures model_type torch_dtype dtype transformers_version _name_or_path name_or_path auto_map _commit_hash
quantization_config cache_implementation use_cache return_dict output_hidden_states output_attentions
gradient_checkpointing chunk_size_feed_forward is_encoder_decoder pretraining_tp ep_size id2label label2id problem_type
task_specific_params
bos_token_id eos_token_id pad_token_id image_token_index boi_token_index eoi_token_index
initializer_range initializer_factor attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout dropout
summary_type summary_use_proj summary_activation summary_proj_to_labels summary_first_dropout
rms_norm_eps layer_norm_epsilon rope_theta rope_scaling rope_parameters rope_local_base_freq rope_interleave
query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping use_bidirectional_attention
scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn
router_aux_loss_coef output_router_logits router_jitter_noise norm_topk_prob aux_loss_alpha seq_aux scoring_func
topk_method n_group topk_group routed_scaling_factor
hidden_act hidden_activation n_ctx tie_word_embeddings
"""
GPT2_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFaceModel:
    """What a config.json says. trainable: a model of this library of the same sizes and operations (how it scales its
    rotation for long contexts is not taken over), None where there is none, for the reason in `why_not`. unused: fields
    that this reader does not know, by name."""

    architecture: Architecture
    trainable: ModelConfig | None
    why_not: str
    unused: tuple[str, ...]


def is_huggingface(values: Any) -> bool:
    """Whether the values of a config.json are in Hugging Face's form and not in ours."""
    return isinstance(values, Mapping) and ("model_type" in values or "architectures" in values)


def read_huggingface(path: Path) -> HuggingFaceModel:
    """The model that the config.json at `path` describes.

    Raises:
      ValueError: the file cannot be read, its kind of model is not known, or a field is lacking or contradicts another.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ValueError(f"model file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
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
        raise ValueError(f"{source}: fields and their values are wanted, got {values!r:.80}.")
    kind = values.get("model_type")
    inner = values.get("text_config")
    if isinstance(inner, Mapping) and "hidden_size" not in values:
        # A model of text and pictures: its decoder alone is planned.
        outer = tuple(sorted(set(values) - {"text_config", *WITHOUT_EFFECT.split()}))
        shared = {name: values[name] for name in ("model_type", "tie_word_embeddings") if name in values}
        found = from_huggingface({**shared, **inner}, source=source)
        return HuggingFaceModel(
            architecture=found.architecture,
            trainable=None,
            why_not="it reads pictures too",
            unused=(*outer, *found.unused),
        )
    if kind is None:
        raise ValueError(f"{source}: model_type is absent. Legal: {', '.join(READERS)}.")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"{source}: model_type {kind!r} is not known. {nearest(str(kind), READERS)}")
    fields = Fields(values, source)
    model = READERS[kind](fields)
    trainable, why_not = _trainable(model, fields)
    unused = tuple(sorted(set(values) - fields.used - {*WITHOUT_EFFECT.split()}))
    return HuggingFaceModel(architecture=model, trainable=trainable, why_not=why_not, unused=unused)


def _trainable(model: Architecture, fields: Fields) -> tuple[ModelConfig | None, str]:
    """The same as a model that this library trains, or why there is none."""
    group, *more = model.layers
    if more:
        return None, "its layers are of several kinds"
    attention, fed = group.attention, group.feed_forward
    gpt2, act = fields.kind == "gpt2", activation(fields)
    known = act in GPT2_ACTIVATIONS if gpt2 else act in ("silu", "swish")
    reasons = {
        "latent attention": attention.kv_rank is not None,
        "attention in a window": attention.window is not None and attention.window < model.context,
        "biases in some of its layers alone": not attention.bias == attention.output_bias == fed.bias,
        "shared experts": bool(fed.shared_width),
        "four norms a layer": model.norms_per_layer != 2,
        "Gemma's scaled embedding": fields.kind.startswith("gemma"),
        f"{act} as its nonlinearity": not known,
    }
    for reason, holds in reasons.items():
        if holds:
            return None, f"it has {reason}"
    eps = ("layer_norm_epsilon", 1e-5) if gpt2 else ("rms_norm_eps", 1e-5 if fields.kind == "mixtral" else 1e-6)
    try:
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
            norm_eps=fields.positive(*eps),
            positions="learned" if gpt2 else "rope",
            rope_theta=_rope_theta(fields),
            activation=GPT2_ACTIVATIONS[act] if gpt2 else "swiglu",
            bias=attention.bias,
            tied=model.tied,
            qk_norm=attention.qk_norm,
            experts=fed.experts,
            experts_per_token=fed.experts_per_token if fed.experts else 2,
            capacity_factor=fed.capacity_factor,
        ), ""
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(fields.source) else f"{fields.source}: {said}") from None


def _rope_theta(fields: Fields) -> float:
    """The base period of the rotation; since transformers 5 it stands among the other values of `rope_parameters`."""
    default = 1e6 if fields.kind == "mixtral" else 1e4
    parameters = fields.values.get("rope_parameters")
    if isinstance(parameters, Mapping) and "rope_theta" in parameters:
        return positive(parameters["rope_theta"], f"{fields.source}: rope_parameters.rope_theta")
    return fields.positive("rope_theta", default)

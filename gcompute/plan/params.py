"""Which arrays a model is made of, and how many parameters they hold."""

import dataclasses
import math
from dataclasses import dataclass

from gcompute.config.model import ModelConfig

COMPONENTS = ("embedding", "positions", "attention", "router", "mlp", "norms", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightArray:
    """One array of parameters: its dims by letter, the sizes they have, and the component it belongs to.

    An array of the blocks has `L` as its first dim: the layers are stacked.
    """

    name: str
    component: str
    dims: str
    shape: tuple[int, ...]

    @property
    def num_params(self) -> int:
        return math.prod(self.shape)

    @property
    def stacked(self) -> bool:
        return self.dims.startswith("L")

    @property
    def is_matrix(self) -> bool:
        """Whether a block multiplies by it (biases and norms, which it does not, are vectors or [heads, H])."""
        return self.component in ("attention", "mlp", "router") and not self.name.endswith("bias")

    @property
    def is_orthogonalised(self) -> bool:
        """Whether Muon orthogonalises it: the blocks' matrices, but no router, whose columns are no features."""
        return self.is_matrix and self.component != "router"

    @property
    def of_experts(self) -> bool:
        """Whether each expert has a part of it of its own."""
        return self.dims.startswith("LE")


def weight_arrays(config: ModelConfig) -> tuple[WeightArray, ...]:
    """Every parameter array of `config`.

    Dims: T is the context, D the model dim, N and K the query and key/value heads, H the head dim, F the feed-forward
    dim, V the vocabulary, L the layers, E the experts, which have a router and no biases. RMSNorm has no bias;
    LayerNorm has one only where the linear layers do. A tied model has no output array of its own, and the output layer
    never has a bias.
    """
    sizes = {
        "T": config.context,
        "D": config.dim,
        "N": config.heads,
        "K": config.num_kv_heads,
        "H": config.head_size,
        "F": config.ffn_size,
        "V": config.vocab,
        "L": config.layers,
        "E": config.num_experts,
    }
    norm_bias = config.bias and config.norm == "layernorm"
    rows = [("embedding", "embedding", "VD", True), ("positions", "positions", "TD", config.positions == "learned")]
    for norm in ("norm1", "norm2"):
        rows += [(f"{norm}.scale", "norms", "LD", True), (f"{norm}.bias", "norms", "LD", norm_bias)]
    for name, dims, bias_dims in (("q", "DNH", "NH"), ("k", "DKH", "KH"), ("v", "DKH", "KH"), ("o", "NHD", "D")):
        rows += [(name, "attention", f"L{dims}", True), (f"{name}.bias", "attention", f"L{bias_dims}", config.bias)]
    rows += [(f"{name}_norm.scale", "norms", "LH", config.qk_norm) for name in "qk"]
    rows += [("router", "router", "LDE", config.experts is not None)]
    each = "" if config.experts is None else "E"
    for name, dims, present in (("gate", "DF", config.gated), ("up", "DF", True), ("down", "FD", True)):
        rows += [(name, "mlp", f"L{each}{dims}", present)]
        rows += [(f"{name}.bias", "mlp", f"L{dims[-1]}", present and config.bias)]
    rows += [("final_norm.scale", "norms", "D", True), ("final_norm.bias", "norms", "D", norm_bias)]
    rows += [("head", "head", "DV", not config.tied)]
    return tuple(
        WeightArray(name=name, component=component, dims=dims, shape=tuple(sizes[dim] for dim in dims))
        for name, component, dims, present in rows
        if present
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamCount:
    """Parameters by component; `active`, those that one token uses; `matmul`, those that it is multiplied by.

    `active` is all but the experts that a token is not sent to. `matmul` holds the active matrices of the blocks and
    the output layer, which a tied model multiplies by too although `head` is then 0. Looking up an embedding or a
    position multiplies nothing.
    """

    embedding: int
    positions: int
    attention: int
    router: int
    mlp: int
    norms: int
    head: int
    active: int
    matmul: int

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.router + self.mlp + self.norms + self.head

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total": self.total}


def count_params(config: ModelConfig) -> ParamCount:
    """Count the parameters of `config`.

    >>> from gcompute.config.presets import PRESETS
    >>> count_params(PRESETS["llama3-8b"]).total
    8030261248
    >>> mixtral = count_params(PRESETS["mixtral-8x7b"])
    >>> f"{mixtral.total / 1e9:.1f}e9 parameters, of which a token uses {mixtral.active / 1e9:.1f}e9"
    '46.7e9 parameters, of which a token uses 12.9e9'
    """
    arrays = weight_arrays(config)
    by_component = {
        component: sum(array.num_params for array in arrays if array.component == component) for component in COMPONENTS
    }
    idle = sum(array.num_params for array in arrays if array.of_experts)
    idle -= idle // config.num_experts * config.num_active_experts
    in_blocks = sum(array.num_params for array in arrays if array.is_matrix) - idle
    total = sum(by_component.values())
    return ParamCount(**by_component, active=total - idle, matmul=in_blocks + config.dim * config.vocab)

"""Which arrays a model is made of, and how many parameters they hold."""

import dataclasses
import math
from dataclasses import dataclass

from gcompute.config.model import ModelConfig

COMPONENTS = ("embedding", "positions", "attention", "mlp", "norms", "head")


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
        return self.component in ("attention", "mlp") and not self.name.endswith("bias")


def weight_arrays(config: ModelConfig) -> tuple[WeightArray, ...]:
    """Every parameter array of `config`.

    Dims: T is the context, D the model dim, N and K the query and key/value heads, H the head dim, F the feed-forward
    dim, V the vocabulary, L the layers. RMSNorm has no bias; LayerNorm has one only where the linear layers do. A tied
    model has no output array of its own, and the output layer never has a bias.
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
    }
    norm_bias = config.bias and config.norm == "layernorm"
    rows = [("embedding", "embedding", "VD", True), ("positions", "positions", "TD", config.positions == "learned")]
    for norm in ("norm1", "norm2"):
        rows += [(f"{norm}.scale", "norms", "LD", True), (f"{norm}.bias", "norms", "LD", norm_bias)]
    for name, dims, bias_dims in (("q", "DNH", "NH"), ("k", "DKH", "KH"), ("v", "DKH", "KH"), ("o", "NHD", "D")):
        rows += [(name, "attention", f"L{dims}", True), (f"{name}.bias", "attention", f"L{bias_dims}", config.bias)]
    rows += [(f"{name}_norm.scale", "norms", "LH", config.qk_norm) for name in "qk"]
    for name, dims, present in (("gate", "DF", config.gated), ("up", "DF", True), ("down", "FD", True)):
        rows += [(name, "mlp", f"L{dims}", present), (f"{name}.bias", "mlp", f"L{dims[-1]}", present and config.bias)]
    rows += [("final_norm.scale", "norms", "D", True), ("final_norm.bias", "norms", "D", norm_bias)]
    rows += [("head", "head", "DV", not config.tied)]
    return tuple(
        WeightArray(name=name, component=component, dims=dims, shape=tuple(sizes[dim] for dim in dims))
        for name, component, dims, present in rows
        if present
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamCount:
    """Parameters by component, and `matmul`: those that each token is multiplied by.

    `matmul` holds the matrices of the blocks and the output layer, which a tied model multiplies by too although
    `head` is then 0. Looking up an embedding or a position multiplies nothing.
    """

    embedding: int
    positions: int
    attention: int
    mlp: int
    norms: int
    head: int
    matmul: int

    @property
    def total(self) -> int:
        return self.embedding + self.positions + self.attention + self.mlp + self.norms + self.head

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total": self.total}


def count_params(config: ModelConfig) -> ParamCount:
    """Count the parameters of `config`.

    >>> from gcompute.config.presets import PRESETS
    >>> count_params(PRESETS["llama3-8b"]).total
    8030261248
    """
    arrays = weight_arrays(config)
    by_component = {
        component: sum(array.num_params for array in arrays if array.component == component) for component in COMPONENTS
    }
    in_blocks = sum(array.num_params for array in arrays if array.is_matrix)
    return ParamCount(**by_component, matmul=in_blocks + config.dim * config.vocab)

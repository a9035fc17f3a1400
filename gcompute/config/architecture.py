"""What a planner has to know of a decoder: its layers, in groups that are alike, whoever trained it.

A `ModelConfig` is a model that this library trains and serves. An `Architecture` may be more: layers of several kinds,
attention in a window, latent attention (MLA), shared experts.
"""

from dataclasses import dataclass

from gcompute.config.model import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Attention of one layer: `heads` query heads N and `kv_heads` key/value heads K, both of `head_dim` H.

    value_dim: size of a value where it is not H. window: how many tokens back a query sees, itself among them; None is
      all of them.
    kv_rank: with latent attention, the size of the vector that keys and values are made from; with `rope_dim` rotated
      values (part of H, shared by all heads) it is all that a cache keeps. q_rank: the same for queries, None without.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int | None = None
    window: int | None = None
    q_rank: int | None = None
    kv_rank: int | None = None
    rope_dim: int = 0
    bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False

    @property
    def value_size(self) -> int:
        return self.value_dim or self.head_dim

    @property
    def cached_values_per_token(self) -> int:
        """Values that a cache keeps of each token in this layer: K (H + value), or the latent vector and its rope."""
        if self.kv_rank is not None:
            return self.kv_rank + self.rope_dim
        return self.kv_heads * (self.head_dim + self.value_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForward:
    """Feed-forward part of one layer: `width` F of each expert, or of the one network where `experts` is None.

    shared_width: F of what every token goes through beside the experts that it is sent to. capacity_factor: as in
      ModelConfig.
    """

    width: int
    gated: bool
    bias: bool = False
    experts: int | None = None
    experts_per_token: int = 1
    shared_width: int = 0
    capacity_factor: float | None = None

    @property
    def rows_per_token(self) -> float:
        """Rows that the experts multiply for each token: k times the capacity factor; all E where there is none."""
        if self.experts is None:
            return 1.0
        if self.capacity_factor is None:
            return float(self.experts)
        return min(float(self.experts), self.experts_per_token * self.capacity_factor)

    @property
    def num_up(self) -> int:
        """Matrices from D to F: two where one gates the other."""
        return 2 if self.gated else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layers:
    """`num` layers that are alike."""

    num: int
    attention: Attention
    feed_forward: FeedForward


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only transformer as a planner sees it. Layers of one kind stand together, whatever their order."""

    name: str
    vocab: int
    dim: int
    layers: tuple[Layers, ...]
    context: int
    tied: bool
    learned_positions: bool = False
    norms_per_layer: int = 2
    norm_bias: bool = False
    head_bias: bool = False

    @property
    def num_layers(self) -> int:
        return sum(group.num for group in self.layers)


def architecture(config: ModelConfig, name: str = "model") -> Architecture:
    """The architecture of a model that this library runs.

    >>> from gcompute.config.presets import PRESETS
    >>> architecture(PRESETS["llama3-8b"]).layers[0].attention.cached_values_per_token
    2048
    """
    attention = Attention(
        heads=config.heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_size,
        bias=config.bias,
        output_bias=config.bias,
        qk_norm=config.qk_norm,
    )
    feed_forward = FeedForward(
        width=config.ffn_size,
        gated=config.gated,
        bias=config.bias,
        experts=config.experts,
        experts_per_token=config.num_active_experts,
        capacity_factor=config.capacity_factor,
    )
    return Architecture(
        name=name,
        vocab=config.vocab,
        dim=config.dim,
        layers=(Layers(num=config.layers, attention=attention, feed_forward=feed_forward),),
        context=config.context,
        tied=config.tied,
        learned_positions=config.positions == "learned",
        norm_bias=config.bias and config.norm == "layernorm",
    )

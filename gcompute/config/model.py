"""The shape of one decoder-only transformer."""

import math
from dataclasses import dataclass
from fractions import Fraction

from gcompute.config.fields import check_choices, check_numbers, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family, with the switches that turn it into GPT-2, Qwen3 or Mixtral.

    Raises:
      ValueError: a size is not positive, heads do not group evenly, RoPE has an odd head dim, or a token is to use more
        experts than there are.
    """

    vocab: int = option(50257, "vocabulary size; training sets it from the tokenizer unless given")
    layers: int = option(4, "transformer blocks")
    dim: int = option(128, "model dim, D")
    heads: int = option(4, "query heads, N")
    kv_heads: int | None = option(None, "key/value heads, K (default: as many as heads)")
    head_dim: int | None = option(None, "size of one head, H (default: dim / heads)")
    ffn: int | None = option(None, "feed-forward dim, F (default: 4 dim, or 8/3 dim rounded up to 32 when gated)")
    context: int = option(256, "longest sequence, in tokens")
    norm: str = option("rmsnorm", "normalisation", choices=("rmsnorm", "layernorm"))
    norm_eps: float = option(1e-5, "added to the variance inside a norm")
    positions: str = option("rope", "position encoding", choices=("rope", "learned"))
    rope_theta: float = option(10000.0, "RoPE base period")
    activation: str = option(
        "swiglu", "feed-forward nonlinearity (swiglu is gated)", choices=("swiglu", "gelu", "gelu_tanh")
    )
    bias: bool = option(False, "biases in linear layers and norms")
    tied: bool = option(True, "share the embedding with the output layer")
    qk_norm: bool = option(False, "RMSNorm on queries and keys, a head at a time")
    experts: int | None = option(None, "feed-forward layers a block to choose among, E (default: one, not chosen)")
    experts_per_token: int = option(2, "experts that each token is sent to, k")
    capacity_factor: float | None = option(
        None, "places an expert has for a sequence, times E / (k T); the rest is dropped (default: room for all)"
    )
    balance_weight: float = option(0.01, "weight of the router's load balance loss")

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(
            self,
            positive=(
                "vocab",
                "layers",
                "dim",
                "heads",
                "kv_heads",
                "head_dim",
                "ffn",
                "context",
                "norm_eps",
                "rope_theta",
                "experts",
                "experts_per_token",
                "capacity_factor",
            ),
            at_least_zero=("balance_weight",),
        )
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} does not divide into heads={self.heads} heads. Use a multiple, or give head_dim."
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} do not group over kv_heads={self.kv_heads}: it must divide them.")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"RoPE rotates pairs, so the head dim must be even, got {self.head_size}.")
        self._check_experts()

    def _check_experts(self) -> None:
        if self.experts is None:
            if self.capacity_factor is not None:
                raise ValueError(
                    f"capacity_factor={self.capacity_factor} is for a model with experts: give experts too."
                )
            return
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token={self.experts_per_token} is more than experts={self.experts}."
                f" Legal: experts_per_token=1 to {self.experts}."
            )
        if self.bias:
            raise ValueError(f"experts={self.experts} have no biases. Use bias=False, or no experts.")

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.heads

    @property
    def gated(self) -> bool:
        return self.activation == "swiglu"

    @property
    def ffn_size(self) -> int:
        if self.ffn is not None:
            return self.ffn
        return -(-8 * self.dim // 3 // 32) * 32 if self.gated else 4 * self.dim

    @property
    def num_experts(self) -> int:
        """Feed-forward layers a block: 1 in a dense model."""
        return self.experts or 1

    @property
    def num_active_experts(self) -> int:
        """Feed-forward layers a token goes through in one block."""
        return 1 if self.experts is None else self.experts_per_token

    def capacity(self, seq: int) -> int:
        """Places that each expert has for the `seq` tokens of one sequence, C = ceil(T k / E factor), at most T.

        The factor counts as the decimal number that it is written as, so that 1.1 of 10 is 11 places.

        >>> ModelConfig(experts=8, capacity_factor=1.25).capacity(4096)
        1280
        """
        if self.experts is None or self.capacity_factor is None:
            return seq
        places = Fraction(str(self.capacity_factor)) * seq * self.experts_per_token / self.experts
        return min(seq, math.ceil(places))

"""The shape of one decoder-only transformer."""

from dataclasses import dataclass

from gcompute.config.fields import check_choices, check_numbers, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family, with the switches that turn it into GPT-2 or Qwen3.

    Raises:
      ValueError: a size is not positive, heads do not group evenly, or RoPE has an odd head dim.
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
            ),
        )
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} does not divide into heads={self.heads} heads. Use a multiple, or give head_dim."
            )
        if self.heads % self.num_kv_heads:
            raise ValueError(f"heads={self.heads} do not group over kv_heads={self.kv_heads}: it must divide them.")
        if self.positions == "rope" and self.head_size % 2:
            raise ValueError(f"RoPE rotates pairs, so the head dim must be even, got {self.head_size}.")

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

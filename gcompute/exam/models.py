"""The models of the book's problems that are no presets: dims as the book gives them."""

from gcompute.config.architecture import Architecture, Attention, FeedForward, Layers, architecture
from gcompute.config.presets import PRESETS

L70 = architecture(PRESETS["llama3-70b"])


def decoder(
    *,
    layers: int,
    dim: int,
    width: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    vocab: int,
    tied: bool = False,
    experts: int | None = None,
    experts_per_token: int = 1,
) -> Architecture:
    """A decoder with a gated feed-forward part and grouped attention."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    fed = FeedForward(width=width, gated=True, experts=experts, experts_per_token=experts_per_token)
    group = Layers(num=layers, attention=attention, feed_forward=fed)
    return Architecture(name="decoder", vocab=vocab, dim=dim, layers=(group,), context=8192, tied=tied)


LLAMA2_13B = decoder(layers=40, dim=5120, width=13824, heads=40, kv_heads=40, head_dim=128, vocab=32000)
# Chapter "transformers", question 1: multi-head, N H = D.
MHA_16B = decoder(layers=64, dim=4096, width=16384, heads=32, kv_heads=32, head_dim=128, vocab=32000)


def inference_model(*, kv_heads: int = 8, experts: int | None = None, experts_per_token: int = 1) -> Architecture:
    """The model of the questions of chapter "inference", 64 layers with N H = 2 D, and what they make of it."""
    return decoder(
        layers=64,
        dim=4096,
        width=16384,
        heads=32,
        kv_heads=kv_heads,
        head_dim=256,
        vocab=32128,
        tied=True,
        experts=experts,
        experts_per_token=experts_per_token,
    )

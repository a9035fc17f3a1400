"""Log-probabilities in OpenAI's two shapes, that of completions and that of chat."""

from collections.abc import Callable, Sequence
from typing import Any

from gcompute.serve.stream import TokenLogprobs

Spell = Callable[[int], bytes]
# JSON has no infinity: what float32 cannot tell from impossible.
LEAST = -9999.0


def completions_logprobs(reports: Sequence[TokenLogprobs], spell: Spell, offset: int) -> tuple[dict[str, Any], int]:
    """Four parallel lists, and the offset at which the next token's text begins."""
    tokens, offsets = [], []
    for one in reports:
        tokens.append(token_text(spell(one.token)))
        offsets.append(offset)
        offset += len(spell(one.token).decode(errors="replace"))
    body = {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, LEAST) for one in reports],
        "top_logprobs": [
            {token_text(spell(token)): max(logprob, LEAST) for token, logprob in one.top} for one in reports
        ],
        "text_offset": offsets,
    }
    return body, offset


def chat_logprobs(reports: Sequence[TokenLogprobs], spell: Spell) -> dict[str, Any]:
    """A list of tokens, each with its bytes and the likeliest others."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        spelled = spell(token)
        return {"token": token_text(spelled), "logprob": max(logprob, LEAST), "bytes": list(spelled)}

    content = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(token, logprob) for token, logprob in one.top]}
        for one in reports
    ]
    return {"content": content, "refusal": None}


def token_text(spelled: bytes) -> str:
    r"""A token as text; one that is part of a character as OpenAI writes it.

    >>> token_text(b" the"), token_text(b"\xe2\x82")
    (' the', 'bytes:\\xe2\\x82')
    """
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

"""Log-probabilities in OpenAI's two shapes, that of completions and that of chat."""

import codecs
from collections.abc import Callable, Collection, Sequence
from typing import Any

from gcompute.serve.stream import TokenLogprobs

Spell = Callable[[int], bytes]
# JSON has no infinity: what float32 cannot tell from impossible.
LEAST = -9999.0


class TextOffsets:
    """Where each token's text begins; a token that goes on with a character begins where that does.

    Exact where tokens are bytes. Other decoders spell some tokens otherwise alone than beside others (a space less).
    """

    def __init__(self, first: int):
        self._at = first
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, spelled: bytes) -> int:
        """Of the next token."""
        if spelled and not 0x80 <= spelled[0] < 0xC0:
            # What came before goes on no further: it is shown as a character that is none.
            self._at += len(self._decoder.decode(b"", final=True))
        at = self._at
        self._at += len(self._decoder.decode(spelled))
        return at


def completions_logprobs(
    reports: Sequence[TokenLogprobs | int],
    spell: Spell,
    offsets: TextOffsets,
    *,
    num_read: int = 0,
    hidden: Collection[int] = (),
) -> dict[str, Any]:
    """Four parallel lists; the chosen token is among the likeliest, as one more if it is not one of them.

    An id instead of a report is the first token of a prompt, which has nothing before it: its values are null. Of the
    reports the first `num_read` are of a prompt; after those, `hidden` ids have no place in the text.
    """

    def likeliest(one: TokenLogprobs | int) -> dict[str, float] | None:
        if isinstance(one, int):
            return None
        return {
            token_text(spell(token)): max(logprob, LEAST) for token, logprob in (*one.top, (one.token, one.logprob))
        }

    ids = [one if isinstance(one, int) else one.token for one in reports]
    spelled = [spell(token) for token in ids]
    shown = [b"" if at >= num_read and ids[at] in hidden else token for at, token in enumerate(spelled)]
    return {
        "tokens": [token_text(token) for token in spelled],
        "token_logprobs": [None if isinstance(one, int) else max(one.logprob, LEAST) for one in reports],
        "top_logprobs": [likeliest(one) for one in reports],
        "text_offset": [offsets.next(token) for token in shown],
    }


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

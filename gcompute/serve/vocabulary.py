"""The engine's side of text: ids of a prompt, text of ids, and what a request asks of the tokenizer."""

from collections.abc import Collection, Sequence

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.adjustments import NO_TOKEN
from gcompute.serve.grammar import Grammar, Grammars
from gcompute.serve.request import RequestError, Sampling


class Vocabulary:
    """A tokenizer, if there is one, for a model of `vocab` ids.

    Raises:
      ValueError: it has more ids than the model.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab: int):
        if tokenizer is not None and tokenizer.vocab_size > vocab:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {vocab}: give the model's own."
            )
        self.tokenizer = tokenizer
        self._vocab = vocab
        self._grammars = Grammars(tokenizer, vocab)

    @property
    def unused(self) -> tuple[range, ...]:
        """Ids that stand for no token, in runs: those of an embedding that was padded, and gaps."""
        if self.tokenizer is None:
            return ()
        ends = [*filter(self.tokenizer.has, range(self._vocab)), self._vocab]
        starts = [0, *(token_id + 1 for token_id in ends)]
        return tuple(range(start, end) for start, end in zip(starts, ends, strict=False) if start < end)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a prompt; an empty one becomes the end-of-text token, after which documents begin.

        Raises:
          RequestError: the tokenizer cannot encode it, or there is none.
        """
        if self.tokenizer is None:
            raise RequestError("this engine has no tokenizer: give the prompt as token ids.", param="prompt")
        if not text and self.tokenizer.end_of_text is not None:
            return (self.tokenizer.end_of_text,)
        try:
            return tuple(self.tokenizer.encode(text))
        except ValueError as error:
            raise RequestError(str(error), param="prompt") from None

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; empty without a tokenizer."""
        return "" if self.tokenizer is None else self.tokenizer.decode(ids)

    def spell(self, token_id: int) -> bytes:
        """The bytes of one token; empty without a tokenizer."""
        return b"" if self.tokenizer is None else self.tokenizer.spell(token_id)

    def hidden(self, sampling: Sampling) -> Collection[int]:
        """The ids that a request's text leaves out."""
        if self.tokenizer is None or not sampling.skip_special_tokens:
            return ()
        return self.tokenizer.special_tokens.values()

    def end_token(self, sampling: Sampling) -> int:
        """The id that ends a request's output beside its own stop ids, or NO_TOKEN."""
        end = self.tokenizer.end_of_text if self.tokenizer is not None else None
        return NO_TOKEN if end is None or sampling.ignore_eos else end

    def grammar(self, sampling: Sampling) -> Grammar | None:
        """What a request's output is held to, if anything.

        Raises:
          RequestError: the schema cannot be followed.
        """
        return None if sampling.json_schema is None else self._grammars.start(sampling.json_schema)

    def check_text(self, sampling: Sampling, *, speculates: bool) -> None:
        """Refuse what this tokenizer, or an engine that proposes tokens, cannot do.

        Raises:
          RequestError: it asks for that.
        """
        if sampling.stop and self.tokenizer is None:
            raise RequestError("stop needs a tokenizer, and this engine has none.", param="stop")
        if sampling.json_schema is not None and speculates:
            reason = "response_format is not for servers that speculate: proposals are not held to a grammar."
            raise RequestError(reason, param="response_format")
        self.grammar(sampling)

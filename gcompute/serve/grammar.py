"""Output that meets a JSON schema: which tokens may come next, by the grammar library llguidance.

A request with a schema has a `Grammar` on the host, which consumes each sampled token and gives the bitmask of the
tokens allowed next. Masks are data of the compiled programs (see `adjustments`): a schema compiles nothing for the
device.
"""

import importlib.util
import json
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from gcompute.model.tokenizer import Tokenizer
from gcompute.serve.request import RequestError

# What json.dumps writes; with any whitespace allowed a model may go on for ever with that.
STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = '{"type": "object"}'
KEPT = 64
WORD = 32


def mask_words(vocab: int) -> int:
    """How many 32-bit words hold a bit for each token."""
    return -(-vocab // WORD)


class Grammars:
    """The schemas that requests for one tokenizer's model ask for, kept compiled for a while. Any thread may call."""

    def __init__(self, tokenizer: Tokenizer | None, vocab: int):
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._tokens: Any = None
        self._kept: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()

    def start(self, schema: str) -> "Grammar":
        """The beginning of an output that meets a schema, given as JSON text.

        Raises:
          RequestError: there is no such library or tokenizer here, or the schema is none that it can follow.
        """
        if self._tokenizer is None or self._tokenizer.end_of_text is None:
            raise _refusal("it needs a tokenizer with an end-of-text token, and this model has none")
        if importlib.util.find_spec("llguidance") is None:
            raise _refusal("llguidance is not installed on this server (pip install 'gcompute[grammar]')")
        import llguidance

        with self._lock:
            if self._tokens is None:
                self._tokens = _tokens_of(self._tokenizer, self._vocab)
            matcher = self._kept.pop(schema, None)
            if matcher is None:
                try:
                    text = llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=STYLE)  # pyright: ignore[reportArgumentType]
                except ValueError as error:
                    raise _refusal(f"the schema cannot be read: {error}") from None
                matcher = llguidance.LLMatcher(self._tokens, text, log_level=0)
            if matcher.is_error():
                raise _refusal(f"the schema cannot be followed: {matcher.get_error()}")
            self._kept[schema] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return Grammar(matcher.deep_copy(), mask_words(self._vocab))


class Grammar:
    """How far one output has come."""

    def __init__(self, matcher: Any, num_words: int):
        self._matcher = matcher
        self._num_words = num_words

    def mask(self) -> np.ndarray:
        """Which tokens may come next, one bit each, lowest first: [words] of 32."""
        return np.frombuffer(self._matcher.compute_bitmask(), "<u4")[: self._num_words]

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises:
          ValueError: it may not come here, or the grammar has become too much to follow.
        """
        if not self._matcher.consume_token(token):
            raise ValueError(f"the grammar stopped: {self._matcher.get_error()}")

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of text may come."""
        return self._matcher.is_stopped()


def _refusal(reason: object) -> RequestError:
    text = " ".join(str(reason).split()).rstrip(".")[:300]
    return RequestError(f"response_format cannot be met: {text}.", param="response_format")


def _tokens_of(tokenizer: Tokenizer, vocab: int) -> Any:
    """The tokenizer as llguidance takes it: by its file, or where that knows no such decoder, by each token's bytes."""
    import llguidance

    end = tokenizer.end_of_text
    try:
        return llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=vocab, eos_token=end)
    except ValueError:
        spelled = llguidance.TokenizerWrapper(_Spelled(tokenizer, vocab))
        return llguidance.LLTokenizer(spelled, n_vocab=vocab, eos_token=end)


class _Spelled:
    def __init__(self, tokenizer: Tokenizer, vocab: int):
        self.eos_token_id = tokenizer.end_of_text
        self.bos_token_id = None
        self.tokens = [tokenizer.spell(token) for token in range(vocab)]
        self.special_token_ids = list(tokenizer.special_tokens.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def read_schema(response_format: Any) -> str | None:
    """The JSON text of the schema that OpenAI's `response_format` asks for; None: any text will do.

    Raises:
      RequestError: it has another form.
    """
    param = "response_format"
    if response_format is None:
        return None
    if not isinstance(response_format, dict):
        raise RequestError("response_format must be an object with a type.", param=param)
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return ANY_OBJECT
    if kind != "json_schema":
        raise RequestError("response_format.type must be text, json_object or json_schema.", param=param)
    named = response_format.get("json_schema")
    schema = named.get("schema") if isinstance(named, dict) else None
    if not isinstance(schema, dict | bool):
        raise RequestError("response_format.json_schema must hold the schema, as {'schema': {...}}.", param=param)
    return json.dumps(schema)

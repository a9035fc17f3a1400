"""What can be asked of the engine: a prompt, how to continue it, and the ways to refuse."""

from dataclasses import dataclass

MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 16
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 20


class RequestError(ValueError):
    """A request that can never be served; `param` names the parameter at fault, `code` is OpenAI's word for it."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFull(Exception):
    """As many requests wait as may: try again later."""


class NotReady(Exception):
    """The engine is loading, draining or closed: it takes no requests now."""


def _check(value: object, param: str, *, whole: bool, low: float, high: float, legal: str) -> None:
    kinds = (int,) if whole else (int, float)
    # bool is a subclass of int, and a float field must refuse what float32 cannot hold.
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise RequestError(f"{param} must be {legal}, got {str(value)[:40]}.", param=param)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen and when to stop. In order: logit_bias, repetition, frequency and presence penalty, the
    end held back by min_tokens, temperature, top-k, top-p, min-p.

    temperature: 0 is greedy. top_k: keep the k most likely; 0 keeps all. top_p: keep the most likely tokens that
    together reach this probability. min_p: keep tokens at least this share as likely as the most likely one.
    seed: the same seed gives the same tokens; None draws one. stop: strings that end the output and are not in it.
    stop_token_ids: token ids that do the same. ignore_eos: the end-of-text token is a token like any other.
    min_tokens: until so many are chosen no end-of-text token or stop id is, and no stop string is looked for.
    presence_penalty, frequency_penalty: subtracted from the logit of a token once, and each time, that the output has
    it. repetition_penalty: divides a positive logit and multiplies a negative one where prompt or output has the token.
    logit_bias: (token id, added to its logit) pairs. logprobs: how many of the most likely tokens to report beside each
    chosen one, by the model's own probabilities, before any setting acts; None reports nothing. prompt_logprobs: the
    same of the prompt's tokens but the first; such a prompt is read whole, whatever the prefix cache has. json_schema:
    the JSON text of a schema that the output meets, unless max_tokens cuts it off; it ends where that does.
    skip_special_tokens: the text leaves out control tokens, which the ids have.

    Raises:
      RequestError: a value has the wrong type or is out of range.
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        int32 = 2**31 - 1
        _check(self.max_tokens, "max_tokens", whole=True, low=1, high=int32, legal="a whole number of at least 1")
        _check(self.temperature, "temperature", whole=False, low=0, high=1e6, legal="a number from 0 to 1e6")
        _check(self.top_k, "top_k", whole=True, low=0, high=int32, legal="a whole number of at least 0 (0: all)")
        for name in ("top_p", "min_p"):
            _check(getattr(self, name), name, whole=False, low=0, high=1, legal="a number from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(getattr(self, name), name, whole=False, low=-2, high=2, legal="a number from -2 to 2")
        legal = "a number from 0.01 to 100"
        _check(self.repetition_penalty, "repetition_penalty", whole=False, low=0.01, high=100, legal=legal)
        legal = f"a whole number from 0 to max_tokens, which is {self.max_tokens}"
        _check(self.min_tokens, "min_tokens", whole=True, low=0, high=self.max_tokens, legal=legal)
        if self.seed is not None:
            _check(self.seed, "seed", whole=True, low=-(2**63), high=2**64 - 1, legal="a 64-bit whole number")
        legal = f"a whole number from 0 to {MAX_TOP_LOGPROBS}"
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None:
                _check(number, name, whole=True, low=0, high=MAX_TOP_LOGPROBS, legal=legal)
        for name in ("ignore_eos", "skip_special_tokens"):
            if not isinstance(value := getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {str(value)[:40]}.", param=name)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop must be strings that are not empty.", param="stop")
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(f"stop takes at most {MAX_STOP_STRINGS} strings, got {len(self.stop)}.", param="stop")
        if not isinstance(self.stop_token_ids, tuple) or not all(map(_is_id, self.stop_token_ids)):
            raise RequestError("stop_token_ids must be token ids.", param="stop_token_ids")
        if len(self.stop_token_ids) > MAX_STOP_TOKENS:
            raise RequestError(
                f"stop_token_ids takes at most {MAX_STOP_TOKENS} ids, got {len(self.stop_token_ids)}.",
                param="stop_token_ids",
            )
        self._check_bias()
        if self.json_schema is not None and not isinstance(self.json_schema, str):
            raise RequestError("json_schema must be the text of a schema.", param="response_format")
        if self.json_schema is not None and (self.ignore_eos or self.min_tokens):
            reason = "the schema says where output ends, and ignore_eos and min_tokens say otherwise"
            raise RequestError(f"response_format excludes those: {reason}.", param="response_format")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, tuple) or not all(
            isinstance(pair, tuple) and len(pair) == 2 and _is_id(pair[0]) for pair in self.logit_bias
        ):
            raise RequestError("logit_bias must be pairs of a token id and a number.", param="logit_bias")
        if len(self.logit_bias) > MAX_BIASES:
            message = f"logit_bias takes at most {MAX_BIASES} tokens, got {len(self.logit_bias)}."
            raise RequestError(message, param="logit_bias")
        for _, bias in self.logit_bias:
            _check(bias, "logit_bias", whole=False, low=-100, high=100, legal="numbers from -100 to 100")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise RequestError("logit_bias names a token twice.", param="logit_bias")


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A prompt of token ids and how to continue it."""

    prompt: tuple[int, ...]
    sampling: Sampling = Sampling()


def check_fits(request: Request, *, vocab: int, max_context: int) -> None:
    """Refuse a prompt that the model cannot read or that leaves too little room for its output.

    Raises:
      RequestError: the prompt is empty, an id is unknown, or prompt and output exceed `max_context` tokens.
    """
    num_prompt, max_tokens = len(request.prompt), request.sampling.max_tokens
    if not num_prompt:
        raise RequestError("prompt must hold at least one token.", param="prompt")
    low, high = min(request.prompt), max(request.prompt)
    if low < 0 or high >= vocab:
        wrong = low if low < 0 else high
        raise RequestError(f"prompt holds token id {wrong}; this model has ids 0 to {vocab - 1}.", param="prompt")
    sampling = request.sampling
    for param, ids in (
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token for token, _ in sampling.logit_bias]),
    ):
        if ids and max(ids) >= vocab:
            raise RequestError(f"{param} holds token id {max(ids)}; this model has ids 0 to {vocab - 1}.", param=param)
    if num_prompt + max_tokens > max_context:
        raise RequestError(
            f"This model's maximum context length is {max_context} tokens. However, you requested "
            f"{num_prompt + max_tokens} tokens ({num_prompt} in the prompt, {max_tokens} in the completion). "
            "Please reduce the length of the prompt or completion.",
            param="prompt" if num_prompt >= max_context else "max_tokens",
            code="context_length_exceeded",
        )


def seed_words(seed: int) -> tuple[int, int]:
    """A 64-bit seed as two 32-bit words, high first; negative seeds wrap."""
    return divmod(seed % 2**64, 2**32)

"""Text to token ids and back, as the engine reads and writes them: POST /tokenize and /detokenize, in vLLM's form."""

from typing import Any

from gcompute.serve.chat import TEMPLATE_FIELDS, TEMPLATE_NEUTRAL, read_prompt
from gcompute.serve.chat_template import ChatTemplate
from gcompute.serve.engine import Engine
from gcompute.serve.parameters import check_model, read_field, read_object, short
from gcompute.serve.request import RequestError

# Special tokens are as in the calls that these count for.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_special_tokens": (True, False),
    "return_token_strs": (),
    **TEMPLATE_NEUTRAL,
}


def tokenized(body: bytes, *, engine: Engine, model_name: str, template: ChatTemplate) -> dict[str, Any]:
    """The ids of a prompt, or of messages by the chat template.

    Raises:
      HttpError: unknown model. RequestError: anything else that is wrong with the call; `param` names what.
    """
    fields = read_object(body, known=("model", "prompt", *TEMPLATE_FIELDS), neutral=NEUTRAL)
    check_model(fields, model_name)
    if fields.get("messages") is not None:
        ids = read_prompt(fields, engine=engine, template=template, to_fit=False)
    elif (prompt := read_field(fields, "prompt", str, None)) is not None:
        ids = engine.encode(prompt)
    else:
        raise RequestError("prompt is required, a string; or messages.", param="prompt")
    return {"count": len(ids), "max_model_len": engine.max_context, "tokens": list(ids)}


def detokenized(body: bytes, *, engine: Engine, model_name: str) -> dict[str, Any]:
    """The text of token ids.

    Raises:
      HttpError: unknown model. RequestError: an id is not the model's, or the call is wrong otherwise.
    """
    fields = read_object(body, known=("model", "tokens"), neutral={})
    check_model(fields, model_name)
    ids = read_field(fields, "tokens", list, None)
    if ids is None:
        raise RequestError("tokens is required: a list of token ids.", param="tokens")
    for one in ids:
        if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < engine.config.vocab:
            message = f"tokens holds {short(one)}, which is no token id; this model has 0 to {engine.config.vocab - 1}."
            raise RequestError(message, param="tokens")
    if engine.tokenizer is None:
        raise RequestError("this engine has no tokenizer.", param="tokens")
    try:
        return {"prompt": engine.decode(ids)}
    except ValueError as error:
        raise RequestError(short(str(error), 300), param="tokens") from None

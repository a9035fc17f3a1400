"""The OpenAI chat protocol as plain values: messages in, requests out; completions and events in, JSON out."""

from typing import Any

from gcompute.serve.engine import Engine
from gcompute.serve.parameters import EMPTY, SHARED, check_model, read_count, read_field, read_object, short
from gcompute.serve.parameters import NEUTRAL as SHARED_NEUTRAL
from gcompute.serve.protocol import Answer, Ask, check_can_fit, make_ask
from gcompute.serve.reports import chat_logprobs
from gcompute.serve.request import MAX_TOP_LOGPROBS, RequestError
from gcompute.serve.stream import Completion, Finished, Tokens
from gcompute.serve.template import ChatTemplate, Message

KNOWN = (*SHARED, "messages", "max_completion_tokens", "top_logprobs")
# As in `parameters.NEUTRAL`, of chat alone.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    **SHARED_NEUTRAL,
    "tools": (),
    "tool_choice": ("none", "auto"),
    "functions": (),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "store": (),
    "service_tier": ("auto", "default"),
    "reasoning_effort": ("none",),
    "include_reasoning": (True,),
    "verbosity": ("medium",),
    "chat_template_kwargs": (),
    "documents": (),
    "add_generation_prompt": (True,),
    # The template writes them: true would ask for them twice.
    "add_special_tokens": (),
    "continue_final_message": (),
    "echo": (),
}
ROLES = ("system", "developer", "user", "assistant")
MAX_MESSAGES = 1024


def parse_chat(body: bytes, *, engine: Engine, model_name: str, template: ChatTemplate) -> Ask:
    """Read a chat call.

    Raises:
      HttpError: unknown model. RequestError: anything else that is wrong with it; `param` names what.
    """
    fields = read_object(body, known=KNOWN, neutral=NEUTRAL)
    check_model(fields, model_name)
    n = read_count(fields, "n", 1, 1)
    if fields.get("max_completion_tokens") is not None:
        if fields.get("max_tokens") not in (None, fields["max_completion_tokens"]):
            raise RequestError("max_tokens and max_completion_tokens differ: give one.", param="max_completion_tokens")
        fields["max_tokens"] = fields["max_completion_tokens"]
    messages = read_messages(fields)
    if engine.tokenizer is None:
        raise RequestError("this engine has no tokenizer, and chat needs one.", param="messages")
    check_can_fit("".join(message.content for message in messages), engine, param="messages")
    try:
        ids = template.encode(messages, engine.tokenizer)
    except ValueError as error:
        raise RequestError(short(str(error), 300), param="messages") from None
    try:
        return make_ask(
            fields,
            engine=engine,
            model_name=model_name,
            prompts=[ids],
            each=n,
            shown=n,
            logprobs=_read_logprobs(fields),
            default_max_tokens=engine.max_context,
            more_stop=template.stop,
            more_end=engine.tokenizer.special_tokens.get(template.end or ""),
        )
    except RequestError as error:
        # The error names a field of the request.
        sent = {"prompt": "messages"}
        if fields.get("max_completion_tokens") is not None:
            sent["max_tokens"] = "max_completion_tokens"
        raise RequestError(str(error), param=sent.get(error.param or "", error.param), code=error.code) from None


def read_messages(fields: dict[str, Any]) -> list[Message]:
    """The messages, checked; parts of text are joined."""
    messages = read_field(fields, "messages", list, None)
    if not messages:
        raise RequestError("messages is required: a list that is not empty.", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise RequestError(f"messages holds {len(messages)}; the most is {MAX_MESSAGES}.", param="messages")
    read = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise RequestError(f"{where} must be an object, got {short(message)}.", param=where)
        for name, value in message.items():
            # An answer that is sent back has fields that hold nothing: `refusal`, `annotations`, and others.
            if name not in ("role", "content", "name") and value is not None and value not in EMPTY:
                raise RequestError(f"{where} has {short(name)!r}, which is not supported.", param=where)
        role = message.get("role")
        if role not in ROLES:
            raise RequestError(f"{where}.role must be one of {', '.join(ROLES)}, got {short(role)}.", param=where)
        if not isinstance(message.get("name", ""), str | None):
            raise RequestError(f"{where}.name must be a string.", param=where)
        read.append(Message(role=role, content=_read_content(message.get("content"), where)))
    return read


def _read_content(content: Any, where: str) -> str:
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RequestError(f"{where}.content must be text, or parts of text; got {short(content)}.", param=where)
    return content


def _read_logprobs(fields: dict[str, Any]) -> int | None:
    wanted = read_field(fields, "logprobs", bool, False)
    num_top = read_field(fields, "top_logprobs", int, None)
    if num_top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    if num_top is not None and not 0 <= num_top <= MAX_TOP_LOGPROBS:
        raise RequestError(f"top_logprobs must be from 0 to {MAX_TOP_LOGPROBS}.", param="top_logprobs")
    return (num_top or 0) if wanted else None


class ChatAnswer(Answer):
    """Builds the JSON of one chat call, whole or in chunks."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        role = {"role": "assistant", "content": ""}
        return [
            {
                **self._head,
                "object": self.chunk_kind,
                "choices": [{"index": index, "delta": role, "logprobs": None, "finish_reason": None}],
                **self.usage_field(None),
            }
            for index in range(len(self._ask.requests))
        ]

    def choice(self, index: int, done: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": done.text, "refusal": None}
        logprobs = chat_logprobs(done.logprobs, self._engine.spell) if self._ask.logprobs else None
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": done.reason}

    def delta(self, index: int, event: Tokens | Finished, echo: str) -> dict[str, Any]:
        ended = isinstance(event, Finished)
        delta = {"content": event.text} if event.text or not ended else {}
        logprobs = None
        if self._ask.logprobs and isinstance(event, Tokens):
            logprobs = chat_logprobs(event.logprobs, self._engine.spell)
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": event.reason if ended else None}

"""What an answer of a server comes to: when its tokens came and how many they are, or why there are none."""

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gcompute.serve.load_client import Answer

MAX_MESSAGE = 300
INTERRUPTED = "interrupted"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One request as the client saw it; times are seconds from the start of the run.

    due_s: when the schedule wanted it sent, None in a closed loop. token_s: arrival of each chunk that holds tokens.
    error: the kind under which a failure is counted, None where the answer is whole; message says more.
    counted: whether completion_tokens is the server's own count; if not it is that of the chunks.
    """

    index: int
    due_s: float | None
    sent_s: float
    end_s: float
    asked_tokens: int
    token_s: Sequence[float] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    counted: bool = True
    finish_reason: str | None = None
    error: str | None = None
    message: str = ""

    @property
    def ttft_s(self) -> float | None:
        """Time to first token; None before there was one."""
        return self.token_s[0] - self.sent_s if len(self.token_s) else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None below two tokens."""
        if len(self.token_s) == 0 or self.completion_tokens < 2:
            return None
        return (self.token_s[-1] - self.token_s[0]) / (self.completion_tokens - 1)

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Times between chunks that hold tokens."""
        return [after - before for before, after in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def late_s(self) -> float:
        """How long after it was due it was sent."""
        return 0.0 if self.due_s is None else self.sent_s - self.due_s


def read_outcome(
    answer: Answer,
    *,
    index: int,
    due_s: float | None,
    asked_tokens: int,
    began_s: float,
    prompt_tokens: int | None,
    failure: tuple[str, str] | None = None,
) -> Outcome:
    """Read an answer; `began_s` is the start of the run, `prompt_tokens` what is known of the prompt.

    failure: kind and message where it did not come whole; what came is read all the same.
    """
    error, message = None, ""
    reader = _Reader()
    if failure is not None and answer.status != 200:
        error, message = failure
    elif answer.status != 200:
        error, message = f"HTTP {answer.status}", error_message(answer.body)
    elif not answer.headers.get("content-type", "").startswith("text/event-stream"):
        error, message = "no stream", f"the answer is {answer.headers.get('content-type', 'of no type')}, not a stream"
    else:
        try:
            error, message = reader.read(answer)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            error, message = "not understood", f"an event cannot be read: {problem}"
        if failure is not None:
            error, message = failure
    usage = reader.usage
    return Outcome(
        index=index,
        due_s=due_s,
        sent_s=answer.sent_s - began_s,
        end_s=answer.end_s - began_s,
        asked_tokens=asked_tokens,
        token_s=array("d", (at_s - began_s for at_s in reader.token_s)),
        prompt_tokens=usage.get("prompt_tokens", prompt_tokens or 0),
        completion_tokens=usage.get("completion_tokens", len(reader.token_s)),
        counted="completion_tokens" in usage,
        finish_reason=reader.finish_reason,
        error=error,
        message=" ".join(message.split())[:MAX_MESSAGE],
    )


def events(parts: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(arrival, data) of server-sent events, each stamped when the end of its line came, however it was cut up."""
    rest, at_s = b"", 0.0
    for at_s, piece in parts:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at_s, line[5:].strip()
    if rest.startswith(b"data:"):
        yield at_s, rest[5:].strip()


class _Reader:
    def __init__(self) -> None:
        self.token_s: list[float] = []
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] = {}

    def read(self, answer: Answer) -> tuple[str | None, str]:
        """Go through the events; return why the answer is not whole, if it is not, and more about it."""
        done, last_s = False, answer.sent_s
        for at_s, data in events(answer.parts):
            if data == b"[DONE]":
                done = True
                continue
            chunk = json.loads(data)
            if chunk.get("error"):
                return "error in the stream", error_message(data)
            last_s = at_s
            for choice in chunk.get("choices", ()):
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
                if _has_tokens(choice):
                    self.token_s.append(at_s)
                    break
            self.usage = chunk.get("usage") or self.usage
        if not done and self.finish_reason is None:
            return "stream cut off", "the stream ended before the answer did"
        if not self.token_s:
            # All that was made ended the output, and is not shown.
            self.token_s.append(last_s)
        return None, ""


def _has_tokens(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings tokens: text, or tokens that are not yet a whole character; not a chat's opening."""
    delta = choice.get("delta")
    if delta is None:
        return bool(choice.get("text")) or choice.get("finish_reason") is None
    if any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls")):
        return True
    return "role" not in delta and "content" in delta and choice.get("finish_reason") is None


def error_message(body: bytes) -> str:
    """What an error answer says, in OpenAI's shape or any other."""
    try:
        fields = json.loads(body)
        error = fields["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:MAX_MESSAGE].decode(errors="replace")

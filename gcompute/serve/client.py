"""A measuring client: sends prompts together as streaming completions and times what comes back.

TTFT is the time from sending a request to its first chunk; time per token is the rest of the stream's time over the
tokens after the first.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One completion as a client saw it; per_token_s is None below two tokens."""

    prompt: str
    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    per_token_s: float | None
    total_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """All completions of one run, in the order of their prompts, and the wall time of the whole."""

    completions: tuple[Measured, ...] = field(default=())
    wall_s: float

    @property
    def num_tokens(self) -> int:
        return sum(done.completion_tokens for done in self.completions)

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def measure(url: str, prompts: Sequence[str], **parameters: Any) -> Load:
    """`measure_all` for code that is not a coroutine."""
    return asyncio.run(measure_all(url, prompts, **parameters))


async def measure_all(url: str, prompts: Sequence[str], *, concurrency: int | None = None, **parameters: Any) -> Load:
    """Send every prompt to `url`/v1/completions, `concurrency` at a time (default: all), and wait for all.

    `parameters` go into each call's body: max_tokens, temperature, seed ...

    Raises:
      ValueError: the server cannot be reached, refuses a call, or ends one with an error.
    """
    if not prompts:
        raise ValueError("there are no prompts to send.")
    concurrency = concurrency or len(prompts)
    gate = asyncio.Semaphore(concurrency)
    limits = httpx.Limits(max_connections=concurrency)
    # No proxy from the environment: its time would be measured too.
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:

        async def one(prompt: str) -> Measured:
            async with gate:
                return await _complete(client, prompt, parameters)

        start_s = time.perf_counter()
        try:
            completions = await asyncio.gather(*map(one, prompts))
        except httpx.HTTPError as error:
            raise ValueError(f"{url} did not answer: {error or type(error).__name__}.") from None
        return Load(completions=tuple(completions), wall_s=time.perf_counter() - start_s)


async def _complete(client: httpx.AsyncClient, prompt: str, parameters: dict[str, Any]) -> Measured:
    body = {**parameters, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
    text: list[str] = []
    finish_reason, usage, first_s = "", {}, None
    start_s = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise ValueError(f"the server answered {response.status_code}: {response.text.strip()[:500]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(f"the server failed in mid-stream: {chunk['error']['message']}")
            if first_s is None:
                first_s = time.perf_counter()
            for choice in chunk["choices"]:
                text.append(choice["text"])
                finish_reason = choice["finish_reason"] or finish_reason
            usage = chunk.get("usage") or usage
    end_s = time.perf_counter()
    if first_s is None or not usage:
        raise ValueError("the server closed the stream before its end.")
    num_tokens = usage["completion_tokens"]
    return Measured(
        prompt=prompt,
        text="".join(text),
        finish_reason=finish_reason,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=num_tokens,
        first_token_s=first_s - start_s,
        per_token_s=(end_s - first_s) / (num_tokens - 1) if num_tokens > 1 else None,
        total_s=end_s - start_s,
    )

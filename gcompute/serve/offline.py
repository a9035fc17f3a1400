"""Complete a list of prompts with an engine, keeping its slots full, and show how far it is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gcompute.serve.request import QueueFull, Request, RequestError, Sampling
from gcompute.serve.stream import Completion, EventStream

if TYPE_CHECKING:
    from gcompute.serve.engine import Engine

Progress = Callable[[int, int], None]


def make_requests(
    prompts: Sequence[str | Sequence[int]],
    params: Sampling | Sequence[Sampling] | None,
    encode: Callable[[str], tuple[int, ...]],
) -> list[Request]:
    """A request for each prompt; `params` are for all, or one for each.

    Raises:
      RequestError: there are as many samplings as neither, or a prompt cannot be encoded.
    """
    each = [params] * len(prompts) if isinstance(params, Sampling) else params or [Sampling()] * len(prompts)
    if len(each) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts came with {len(each)} samplings: give one, or one a prompt.")
    return [
        Request(prompt=encode(prompt) if isinstance(prompt, str) else tuple(prompt), sampling=own)
        for prompt, own in zip(prompts, each, strict=True)
    ]


def complete_all(engine: "Engine", requests: Sequence[Request], progress: Progress) -> list[Completion]:
    """Every completion, in order. `progress` hears (number done, number in all). Raises as `Engine.submit` does."""
    streams: list[EventStream] = []
    done: list[Completion] = []
    try:
        while len(done) < len(requests):
            try:
                while len(streams) < len(requests):
                    streams.append(engine.submit(requests[len(streams)]))
            except QueueFull:
                if len(done) == len(streams):
                    raise
            done.append(streams[len(done)].result())
            progress(len(done), len(requests))
    finally:
        for stream in streams[len(done) :]:
            engine.cancel(stream)
    return done


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on standard error where that is a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("completing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

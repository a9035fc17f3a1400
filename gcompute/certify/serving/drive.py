"""Put traffic to an engine as its users would, from outside, and collect the answers."""

from collections import deque
from collections.abc import Callable, Sequence

from gcompute.certify.serving.traffic import Arrival, Wave
from gcompute.serve.engine import Engine
from gcompute.serve.request import QueueFull
from gcompute.serve.stream import Completion, Event, EventStream, Finished, Tokens, completion

# An engine that says nothing for so long has lost a request.
PATIENCE_S = 120.0

Progress = Callable[[int], None]


class _Listener:
    """The events of one request so far; calls it off when it has as many tokens as its arrival says."""

    def __init__(self, engine: Engine, arrival: Arrival, stream: EventStream):
        self.arrival, self.stream = arrival, stream
        self.events: list[Event] = []
        self._engine, self._num_tokens = engine, 0
        self._cancel()

    @property
    def done(self) -> bool:
        return bool(self.events) and isinstance(self.events[-1], Finished)

    def hear(self) -> None:
        """Take the next event."""
        event = self.stream.get(PATIENCE_S)
        self.events.append(event)
        if isinstance(event, Tokens):
            self._num_tokens += len(event.ids)
            self._cancel()

    def _cancel(self) -> None:
        after = self.arrival.cancel_after
        if after is not None and self._num_tokens >= after:
            self._engine.cancel(self.stream)


def drive(engine: Engine, waves: Sequence[Wave], progress: Progress = lambda done: None) -> list[Completion]:
    """Every answer, in the order of arrival.

    Raises:
      TimeoutError: a request got no answer.
    """
    listeners: list[_Listener] = []
    # Those whose events are taken as they come, in turn.
    live: deque[_Listener] = deque()

    def hear_one() -> bool:
        while live:
            listener = live.popleft()
            if not listener.done:
                listener.hear()
                live.append(listener)
                return True
        return False

    def enter(arrivals: Sequence[Arrival]) -> None:
        streams = engine.submit_all([arrival.request for arrival in arrivals])
        for arrival, stream in zip(arrivals, streams, strict=True):
            listener = _Listener(engine, arrival, stream)
            listeners.append(listener)
            if arrival.streamed or arrival.cancel_after is not None:
                live.append(listener)

    def enter_one(arrival: Arrival) -> None:
        while True:
            try:
                return enter([arrival])
            except QueueFull:
                if not hear_one():
                    _hear_all(next(listener for listener in listeners if not listener.done))

    for wave in waves:
        for _ in range(wave.pause):
            hear_one()
        try:
            enter(wave.arrivals)
        except QueueFull:
            for arrival in wave.arrivals:
                enter_one(arrival)
        progress(sum(listener.done for listener in listeners))
    while hear_one():
        pass
    for listener in listeners:
        _hear_all(listener)
    progress(len(listeners))
    return [completion(listener.events) for listener in listeners]


def _hear_all(listener: _Listener) -> None:
    while not listener.done:
        listener.hear()

"""What the engine's thread runs programs with: the parameters, the compiled programs and the one donated state."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from gcompute.model.transformer import Params
from gcompute.serve import programs
from gcompute.serve.choices import Choices
from gcompute.serve.programs import EngineShape, EngineState, Program
from gcompute.serve.request import Request

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompilationCount:
    """Counts what one thread compiles from `watch` on, on that thread, to `stop`."""

    def __init__(self) -> None:
        self.num = 0
        self._thread: int | None = None

    def watch(self) -> None:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def stop(self) -> None:
        if self._thread is None:
            return
        self._thread = None
        # JAX 0.7 has no way to take a listener back: there it stays, and is of no thread.
        unregister = getattr(jax.monitoring, "unregister_event_duration_listener", None)
        if unregister is not None:
            unregister(self._hear)

    def _hear(self, event: str, *_: Any, **__: Any) -> None:
        self.num += event == COMPILE_EVENT and threading.get_ident() == self._thread


class Runner:
    """Compiles once, then dispatches. Not locked: one thread dispatches."""

    def __init__(self, params: Params, shape: EngineShape):
        self.shape = shape
        self.compiled: dict[Program, Callable[..., Any]] = {}
        self.state: EngineState | None = None
        self.num_dispatches = 0
        self.compilations = CompilationCount()
        prepare = partial(programs.serving_params, config=shape.model, compute=shape.execution.compute)
        self._params = jax.jit(prepare)(params)

    def compile(self, program: Program) -> None:
        """Compile a program that is not compiled yet."""
        if program not in self.compiled:
            self.compiled[program] = programs.compile_program(program, self._params, self.shape)

    def reset(self) -> None:
        """Free all slots."""
        self.state = self.compiled[Program("init", self.shape.max_context)]()

    def is_lost(self) -> bool:
        """Whether a failed dispatch took the donated state with it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))

    def prefill(self, request: Request, *, slot: int, bucket: int, end: int, seed: int) -> Choices:
        """Read a prompt into a slot; one row of one token."""
        new = programs.admission(request, slot=slot, bucket=bucket, end=end, seed=seed)
        return self._dispatch(Program("prefill", bucket), new)

    def decode(self, slots: list[int], *, bucket: int, num_steps: int, until_free: bool) -> Choices:
        """Take up to `num_steps` steps for the requests in `slots`; a row for every slot."""
        running_B = np.zeros(self.shape.slots, bool)
        running_B[slots] = True
        return self._dispatch(Program("decode", bucket), running_B, np.int32(num_steps), np.bool_(until_free))

    def _dispatch(self, program: Program, *arguments: Any) -> Choices:
        """Run one program on the state and wait for what it chose."""
        state, choices = self.compiled[program](self._params, self.state, *arguments)
        jax.block_until_ready(choices)
        self.state = state
        self.num_dispatches += 1
        return choices

"""What the engine's thread runs programs with: the parameters, the compiled programs and the one donated state."""

import threading
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from gcompute.config.model import ModelConfig
from gcompute.model.transformer import Params
from gcompute.serve.choices import Choices
from gcompute.serve.compilation import Program, compile_program
from gcompute.serve.grammar import mask_words
from gcompute.serve.native.huge_pages import collapse
from gcompute.serve.placement import spread, weight_shardings
from gcompute.serve.programs import Saved
from gcompute.serve.state import EngineShape, EngineState, Rows, Weights
from gcompute.serve.weights import serving_weights
from gcompute.serve.work import Decode, Prefill, SwapIn, SwapOut

# Smaller weights are not worth a huge page.
SMALLEST_COLLAPSED = 1 << 18
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

    def __init__(self, params: Params, shape: EngineShape, draft: Params | None = None):
        self.shape = shape
        self.compiled: dict[Program, Callable[..., Any]] = {}
        self._compiling = threading.Lock()
        self.state: EngineState | None = None
        self.num_dispatches = 0
        self.compilations = CompilationCount()

        def prepare(params: Params, config: ModelConfig) -> Params:
            lay_out = partial(
                serving_weights,
                config=config,
                compute=shape.execution.compute,
                layout=shape.layout,
                int8=shape.int8,
            )
            if shape.execution.placement is None:
                return jax.jit(lay_out)(params)
            # A checkpoint's lie on one device, and a program's arguments on all of its devices.
            return jax.jit(lay_out, out_shardings=weight_shardings(shape, config))(spread(shape, config, params))

        self._weights = Weights(
            model=prepare(params, shape.model),
            draft=prepare(draft, shape.draft) if draft is not None and shape.draft is not None else None,
        )
        if shape.layout.native:
            leaves = jax.tree.leaves(jax.block_until_ready(self._weights))
            collapse(leaf for leaf in leaves if leaf.nbytes >= SMALLEST_COLLAPSED)
        # Keys and values of preempted requests, on the host.
        self._saved: dict[int, Saved] = {}

    def compile(self, program: Program) -> None:
        """Compile a program that is not compiled yet, on any thread."""
        with self._compiling:
            if program in self.compiled:
                return
            self.compiled[program] = compile_program(program, self._weights, self.shape)

    def reset(self) -> None:
        """Free all slots and pages."""
        self.state = self.compiled[Program("init")]()
        self._saved.clear()

    def is_lost(self) -> bool:
        """Whether a failed dispatch took the donated state with it."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves(self.state))

    def admit(self, slot: int, row: Rows) -> None:
        """Put a request's row into its slot."""
        self.state = self.compiled[Program("admit")](self.state, np.int32(slot), row)

    def bind(self, masks: Mapping[int, np.ndarray]) -> None:
        """Tell slots which tokens may come next; none: do nothing."""
        if not masks:
            return
        slots = np.full(self.shape.limits.slots, self.shape.limits.slots, np.int32)
        allowed = np.zeros((len(slots), mask_words(self.shape.model.vocab)), np.uint32)
        for at, (slot, mask) in enumerate(masks.items()):
            slots[at], allowed[at] = slot, mask
        self.state = self.compiled[Program("bind")](self.state, slots, allowed)

    def prefill(self, work: Prefill) -> Choices:
        """Read a chunk; one row of one token, which is NO_TOKEN unless the chunk is the last."""
        return self._read("prefill", work)

    def score(self, work: Prefill) -> tuple[Choices, Choices]:
        """As `prefill`, with a row of `chunk` choices that are the prompt's own tokens."""
        return self._read("score", work)

    def _read(self, kind: str, work: Prefill) -> Any:
        table = self._table(work.pages, work.bucket)
        numbers = (np.int32(work.start), np.int32(work.num_tokens), np.bool_(work.last))
        return self._dispatch(Program(kind, (work.chunk, work.bucket)), np.int32(work.slot), table, *numbers)

    def decode(self, work: Decode) -> Choices:
        """Take up to `num_steps` steps; a row for each of the work's."""
        limits = self.shape.limits
        per_share = len(work.rows) // limits.shares
        tables = np.stack(
            [
                self._table(row.pages if row else (), work.bucket, share=at // per_share)
                for at, row in enumerate(work.rows)
            ]
        )
        slots = np.array([row.slot if row else limits.slots for row in work.rows], np.int32)
        program = Program("speculate" if work.speculate else "decode", (len(work.rows), work.bucket))
        return self._dispatch(program, slots, tables, np.int32(work.num_steps), np.bool_(work.until_free))

    def swap_out(self, work: SwapOut) -> None:
        """Keep a request's keys and values on the host."""
        saved = self.compiled[Program("swap_out", (work.bucket,))](self.state, self._table(work.pages, work.bucket))
        self._saved[work.request_id] = jax.device_get(saved)

    def swap_in(self, work: SwapIn) -> None:
        """Put them into new pages."""
        program = self.compiled[Program("swap_in", (work.bucket,))]
        self.state = program(self.state, self._table(work.pages, work.bucket), self._saved.pop(work.request_id))

    def forget(self, request_id: int) -> None:
        """Let go of what is kept of a request that ended."""
        self._saved.pop(request_id, None)

    def _table(self, pages: tuple[int, ...], bucket: int, *, share: int = 0) -> np.ndarray:
        """The pages of one row, [bucket / page]; those that it lacks are its share's garbage page."""
        limits = self.shape.limits
        table = np.full(bucket // limits.page, limits.garbage_pages[share], np.int32)
        held = pages[: len(table)]
        table[: len(held)] = held
        return table

    def _dispatch(self, program: Program, *arguments: Any) -> Any:
        """Run one program on the state and wait for what it chose."""
        state, choices = self.compiled[program](self._weights, self.state, *arguments)
        jax.block_until_ready(choices)
        self.state = state
        self.num_dispatches += 1
        return choices

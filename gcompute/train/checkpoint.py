"""Checkpoints with Orbax: asynchronous, atomic, the last N kept, each with all that a run needs to go on.

A checkpoint of step s, in DIRECTORY/s, holds the parameters, the optimizer's state and, as JSON, the configuration and
the data position (which is s itself: the batches are a function of seed and step). A directory appears under its final
name only when it is whole; what a crash left half-written is swept away on the next start.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gcompute.model.pretrained import META, OPTIMIZER, PARAMS
from gcompute.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save."""

    def __init__(self, directory: Path, *, keep: int, create: bool = True):
        """Raises ValueError when the directory cannot be made or written."""
        # Orbax logs every save at WARNING through absl when it is not initialised; its errors still arrive as exceptions.
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=create, cleanup_tmp_directories=True)
        self.directory = directory.absolute()
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, item_names=(PARAMS, OPTIMIZER, META), options=options
            )
        except OSError as error:
            raise ValueError(f"checkpoint directory {directory} cannot be used: {error.strerror or error}.") from None
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Start saving `state`; training may go on and donate it at once.

        Raises:
          OSError: this save, or the one before, could not be written.
        """
        # On CPU Orbax would write from the very buffers that the next step is about to reuse.
        copied = self._copy((state.params, state.optimizer))
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                **{
                    PARAMS: ocp.args.StandardSave(copied[0]),
                    OPTIMIZER: ocp.args.StandardSave(copied[1]),
                    META: ocp.args.JsonSave({**meta, "step": int(state.step)}),
                }
            ),
        )

    def wait(self) -> None:
        """Block until the save under way is on disk; raises what went wrong with it."""
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def restore(
        self, abstract: TrainState, notice: Callable[[str], None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, on the shardings of `abstract`, and its meta; None when there is none.

        A damaged checkpoint is reported through `notice`, deleted, and the one before it is tried.

        Raises:
          ValueError: there are checkpoints and none can be read.
        """
        found = list(reversed(self.steps()))
        for step in found:
            try:
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        **{
                            PARAMS: ocp.args.StandardRestore(abstract.params),
                            OPTIMIZER: ocp.args.StandardRestore(abstract.optimizer),
                            META: ocp.args.JsonRestore(),
                        }
                    ),
                )
            # Orbax and TensorStore raise many kinds for a damaged file: each means that this checkpoint is unusable.
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
                notice(f"checkpoint {step} in {self.directory} cannot be read ({reason}); trying the one before it.")
                continue
            for damaged in [s for s in found if s > step]:
                self._manager.delete(damaged)
            state = TrainState(jnp.asarray(step, jnp.int32), restored[PARAMS], restored[OPTIMIZER])
            return state, dict(restored[META])
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.directory} can be read. Restore them from a copy, or"
                " start again in another --out."
            )
        return None

    def read_meta(self) -> dict[str, Any] | None:
        """The JSON of the newest checkpoint whose JSON can be read; None when there is none."""
        for step in reversed(self.steps()):
            try:
                args = ocp.args.Composite(**{META: ocp.args.JsonRestore()})
                return dict(self._manager.restore(step, args=args)[META])
            except Exception:  # as in restore: a damaged file, whose checkpoint restore() will report
                continue
        return None

"""Checkpoints with Orbax: asynchronous, atomic, the last N and the best kept, each with all that a run needs.

A checkpoint of step s, in DIRECTORY/s, holds the parameters, the optimizer's state and, as JSON, the configuration and
the data position (which is s itself: the batches are a function of seed and step). A directory appears under its final
name only when it is whole, with the checksums of its files; what a crash left half-written is swept away on the next
start. A checkpoint is read only where every file still has its checksum.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gcompute.config.train import RESUMABLE
from gcompute.model.checksums import write_manifest
from gcompute.model.pretrained import (
    META,
    OPTIMIZER,
    PARAMS,
    VALIDATION,
    Validated,
    best_saved,
    check_step,
    check_whole,
    saved_steps,
    unreadable,
)
from gcompute.train.step import TrainState

ITEMS = (PARAMS, OPTIMIZER, META)
# etils, by which Orbax opens paths, takes these for the beginning of a URL wherever they stand.
BUCKETS = {"gs:", "s3:", "az:"}


def check_path(directory: Path) -> None:
    """Refuse a path where a checkpoint could not be written, or not be read again.

    Raises:
      ValueError: the path holds a character of a file name pattern, by which Orbax looks for its own files, a name
        that it takes for a bucket's, or bytes that are not UTF-8.
    """
    path = directory.absolute()
    why = ""
    if found := sorted(set("[*?\\") & set(str(path))):
        why = f"{' '.join(found)} in its path stands for other characters"
    elif found := sorted(BUCKETS & set(path.parts)):
        why = f"{found[0]} in its path stands for a bucket"
    elif re.search("[\ud800-\udfff]", str(path)):
        why = "its path is not UTF-8 in this locale, as it may be with LC_ALL=C.UTF-8"
    if why:
        shown = str(directory).encode("utf-8", errors="backslashreplace").decode("utf-8")
        raise ValueError(f"{shown} cannot keep checkpoints: {why}. Choose a directory without that.")


class OtherRun(ValueError):
    """A checkpoint that is sound and does not belong to the run that asks for it."""


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    best: with `keep_best`, the checkpoint of lowest validation loss, which is kept besides the `keep` newest.
    """

    def __init__(self, directory: Path, *, keep: int, keep_best: bool = False, create: bool = True):
        """Raises ValueError when the directory cannot be made, written, or read back."""
        check_path(directory)
        # Orbax logs every save at WARNING where absl is not initialised, and errors with their tracebacks; they arrive
        # as exceptions too.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            create=create,
            preservation_policy=self,
            cleanup_tmp_directories=True,
            # Called when all files of all items are there and the directory has not yet its name.
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
        )
        self.directory = directory.absolute()
        self.best: Validated | None = best_saved(self.directory) if keep_best else None
        self._keep, self._keep_best = keep, keep_best
        self._saving: int | None = None
        try:
            self._manager = ocp.CheckpointManager(self.directory, item_names=ITEMS, options=options)
        except OSError as error:
            raise ValueError(f"checkpoint directory {directory} cannot be used: {error.strerror or error}.") from None
        self._copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._told():
                self._manager.close()
        else:
            # What ended the run is the news; a save that fails now leaves the checkpoints before it as they were.
            with suppress(Exception):
                self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which checkpoints stay, of all those there and the one being saved, oldest first; Orbax asks."""
        best = self.best.step if self.best else None
        newest = {checkpoint.step for checkpoint in checkpoints[-self._keep :]}
        return [checkpoint.step in newest or checkpoint.step == best for checkpoint in checkpoints]

    def improves(self, validation: Validated) -> bool:
        """Whether a validation loss is lower than that of the best checkpoint, or does not compare with it."""
        best = self.best
        return best is None or best.batches != validation.batches or validation.loss < best.loss

    def save(self, state: TrainState, meta: dict[str, Any], validation: Validated | None = None) -> None:
        """Start saving `state`; training may go on and donate it at once. `validation`: of these very parameters.

        Raises:
          OSError: this save, or the one before, could not be written.
        """
        if validation is not None:
            meta = {**meta, VALIDATION: {"loss": validation.loss, "batches": validation.batches}}
        # On CPU Orbax would write from the very buffers that the next step is about to reuse.
        copied = self._copy((state.params, state.optimizer))
        with self._told():
            self._manager.wait_until_finished()
            self._saving = int(state.step)
            if self._keep_best and validation is not None and self.improves(validation):
                self.best = validation
            self._manager.save(
                self._saving,
                args=ocp.args.Composite(
                    **{
                        PARAMS: ocp.args.StandardSave(copied[0]),
                        OPTIMIZER: ocp.args.StandardSave(copied[1]),
                        META: ocp.args.JsonSave({**meta, "step": self._saving}),
                    }
                ),
            )

    def _add_checksums(self) -> None:
        """Add the checksums to the checkpoint being saved. Called in the thread that saves, once every file is there.

        Raises:
          OSError: they could not be computed or written: the checkpoint does not come to be.
        """
        if jax.process_index() == 0:
            for path in self.directory.iterdir():
                if path.name == str(self._saving) or path.name.startswith(f"{self._saving}.orbax-checkpoint-tmp"):
                    write_manifest(path, ITEMS)

    def wait(self) -> None:
        """Block until the save under way is on disk.

        Raises:
          OSError: it could not be written.
        """
        with self._told():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say in one line what Orbax and TensorStore say in many, of many kinds."""
        try:
            yield
        except Exception as error:
            whole = saved_steps(self.directory)
            stands = f"Checkpoint {whole[-1]} stands" if whole else "There is no other"
            raise OSError(
                f"a checkpoint in {self.directory} could not be written ({unreadable(error)}). {stands}: make room"
                " there, then go on with --resume."
            ) from None

    def restore(
        self, abstract: TrainState, notice: Callable[[str], None], *, run: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that can be read, on the shardings of `abstract`, and its meta; None without one.

        A damaged checkpoint is reported through `notice`, and the one before it is tried. Where that can be read, the
        damaged ones are set aside as STEP.damaged, so that the run can save those steps again. `run` is the meta of the
        run that goes on: it must be that of the checkpoint, but for what may be given anew (`RESUMABLE`).

        Raises:
          ValueError: there are checkpoints and none can be read, or the newest that can is of another run.
        """
        found = list(reversed(self.steps()))
        reason = ""
        for step in found:
            try:
                self._check_whole(step, notice)
                saved = self._manager.restore(step, args=ocp.args.Composite(**{META: ocp.args.JsonRestore()}))[META]
                check_step(saved, step)
                if run is not None:
                    self._check_same(step, saved, run)
                restored = self._manager.restore(
                    step,
                    args=ocp.args.Composite(
                        **{
                            PARAMS: ocp.args.StandardRestore(abstract.params),
                            OPTIMIZER: ocp.args.StandardRestore(abstract.optimizer),
                        }
                    ),
                )
            except OtherRun:
                raise
            # Orbax and TensorStore raise many kinds for a damaged file: each means that this checkpoint is unusable.
            except Exception as error:
                reason = unreadable(error)
                notice(f"checkpoint {step} in {self.directory} cannot be read ({reason}); trying the one before it.")
                continue
            self._set_aside([damaged for damaged in found if damaged > step])
            state = TrainState(jnp.asarray(step, jnp.int32), restored[PARAMS], restored[OPTIMIZER])
            return state, dict(saved)
        if found:
            raise ValueError(
                f"none of the {len(found)} checkpoints in {self.directory} can be read ({reason}). Restore them from a"
                " copy, or start again in another --out."
            )
        return None

    def _check_whole(self, step: int, notice: Callable[[str], None]) -> None:
        """Raise ValueError in every process of the job where the first finds a file damaged: it reads for all."""
        reason = ""
        if jax.process_index() == 0:
            try:
                check_whole(self.directory / str(step), ITEMS, notice)
            except (ValueError, OSError) as error:
                reason = str(error)
        if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.asarray(bool(reason))):
            reason = reason or "the first process says why"
        if reason:
            raise ValueError(reason)

    def _check_same(self, step: int, saved: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        for what, sections in (("model or optimizer", ("model", "optimizer")), ("run", ("train", "data"))):
            there, here = (
                {name: value for section in sections for name, value in kept.get(section, {}).items()}
                for kept in (saved, json.loads(json.dumps(run)))
            )
            # A field that one of them lacks is of another version of this program, where it had one meaning only.
            differ = [name for name in here if name in there and name not in RESUMABLE and here[name] != there[name]]
            if differ:
                fields = ", ".join(f"{name} is {there[name]!r} there and {here[name]!r} here" for name in differ)
                raise OtherRun(
                    f"checkpoint {step} in {self.directory} is of another {what}: {fields}. Use another --out, or undo"
                    " the change of its run.json."
                )

    def _set_aside(self, damaged: list[int]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                names = (f"{step}.damaged{n or ''}" for n in itertools.count())
                free = next(self.directory / name for name in names if not (self.directory / name).exists())
                os.replace(self.directory / str(step), free)
        multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()
        self.best = best_saved(self.directory) if self._keep_best else None

"""The engine's programs that the TPU compiler compiled, as the planner is asked about them."""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gcompute.config.architecture import architecture
from gcompute.config.mesh import MeshShape
from gcompute.config.presets import PRESETS
from gcompute.hardware.target import Target
from gcompute.plan.serving import ServeMemory, ServeRun, serve_memory

SERVE = Path(__file__).with_name("compiled_serve.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledServe:
    """One program, "prefill" or "decode", and the compiler's bytes of one device. fits: whether it let it."""

    name: str
    program: str
    run: ServeRun
    target: Target
    needed_bytes: int
    limit_bytes: int
    fits: bool

    def predicted_bytes(self, memory: ServeMemory | None = None) -> float:
        return (memory or serve_memory(self.run, self.target)).program_bytes(self.program)


@cache
def compiled_serve() -> tuple[CompiledServe, ...]:
    """Every record of compiled_serve.json."""
    return tuple(_record(one) for one in json.loads(SERVE.read_text(encoding="utf-8")))


def _record(one: dict[str, Any]) -> CompiledServe:
    config = dataclasses.replace(PRESETS[one["model"]], **one.get("changes", {}))
    run = ServeRun(
        model=architecture(config, one["model"]),
        # A run must have room for one token; the bucket of a prompt that fills the context is the same.
        prompt=min(one["prompt"], one["context"] - 1),
        output=1,
        concurrency=one["slots"],
        context=one["context"],
        mesh=MeshShape.parse(one["mesh"]),
    )
    changed = " changed" if one.get("changes") else ""
    return CompiledServe(
        name=f"{one['program']} of {one['model']}{changed} on {one['target']}, {one['mesh']}, {one['slots']} slots of"
        f" {one['context']}, prompt {one['prompt']}",
        program=one["program"],
        run=run,
        target=Target.parse(one["target"]),
        needed_bytes=one["needed_bytes"],
        limit_bytes=one["limit_bytes"],
        fits=one["fits"],
    )

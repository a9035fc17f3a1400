"""Programs that the real compilers compiled, as the planner is asked about them, and the bytes that they need."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.presets import PRESETS
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.hardware.target import Target
from gcompute.plan.memory import OPERAND_BYTES
from gcompute.plan.program_memory import WORKSPACE, ProgramMemory, program_memory
from gcompute.plan.train_plan import TrainQuestion, question_of

TRAIN = Path(__file__).with_name("compiled_train.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledTrain:
    """One train step: what was compiled, and the compiler's bytes of one device. fits: whether it let it."""

    name: str
    model: str
    run: RunConfig
    target: Target
    accumulation: int
    arguments_bytes: int
    needed_bytes: int
    limit_bytes: int
    fits: bool

    @property
    def question(self) -> TrainQuestion:
        return question_of(self.run, self.target, self.accumulation, name=self.name)

    def predicted(self, workspace: Mapping[str, float] = WORKSPACE) -> ProgramMemory:
        question = self.question
        residual = OPERAND_BYTES[question.residual]
        return program_memory(question.run, residual_bytes=residual, padding=question.padding, workspace=workspace)


@cache
def compiled_train() -> tuple[CompiledTrain, ...]:
    """Every record of compiled_train.json."""
    return tuple(_record(one) for one in json.loads(TRAIN.read_text(encoding="utf-8"))["runs"])


def _record(one: dict[str, Any]) -> CompiledTrain:
    config: ModelConfig = dataclasses.replace(PRESETS[one["model"]], **one.get("changes", {}))
    train = TrainConfig(
        batch=one["batch"],
        seq=one["seq"],
        mesh=MeshShape.parse(one["mesh"]),
        accumulation=one["accumulation"],
        remat=one["remat"],
        residual=one["residual"],
        zero=one.get("zero", 0),
        collective_matmul=one.get("collective_matmul", True),
    )
    optimizer = OptimizerConfig(optimizer=one["optimizer"])
    changed = " changed" if one.get("changes") else ""
    return CompiledTrain(
        model=f"{one['model']} {one.get('changes', '')}",
        name=f"{one['model']}{changed} on {one['target']}, {one['mesh']}, {one['batch']} x {one['seq']}, remat"
        f" {one['remat']}",
        run=RunConfig(model=config, optimizer=optimizer, train=train, data=DataConfig()),
        target=Target.parse(one["target"]),
        accumulation=one["accumulation"],
        arguments_bytes=one["arguments_bytes"],
        needed_bytes=one["needed_bytes"],
        limit_bytes=one["limit_bytes"],
        fits=one["fits"],
    )

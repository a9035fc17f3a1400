"""What the trainer is asked to do in each row: a mesh, a model and the settings that shape the program."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gcompute.certify.precision import FLOAT32, FLOAT64, PRECISIONS
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig

# The strategy of rows that belong to all.
ALWAYS = ("one device",)
BATCH, SEQ, STEPS = 8, 16, 4
LLAMA = ModelConfig(vocab=32, layers=2, dim=16, heads=4, kv_heads=2, ffn=32, context=SEQ, qk_norm=True)
GPT2 = replace(
    LLAMA,
    kv_heads=None,
    qk_norm=False,
    norm="layernorm",
    positions="learned",
    activation="gelu_tanh",
    bias=True,
    tied=False,
)
# Three quarters of the places that even routing would fill: every sequence drops some choices.
MIXTURE = replace(LLAMA, qk_norm=False, experts=4, experts_per_token=2, capacity_factor=0.75, balance_weight=0.0625)
DEEP = replace(LLAMA, layers=4)
# optax computes schedules in float32. Powers of two keep every rate of these four steps exact there: 2^-8, 2^-7, 2^-7
# and 3/4 2^-7. The norms of these gradients lie above 1, so steps are clipped.
ADAMW = OptimizerConfig(
    optimizer="adamw", learning_rate=2.0**-7, schedule="linear", warmup_steps=2, final_fraction=0.5, clip=1.0
)
# A key bias has no gradient, for softmax ignores it, and AdamW would blow its rounding up to whole steps.
SGD = replace(ADAMW, optimizer="sgd", learning_rate=2.0**-5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One row of the trainer.

    refused: a word of the reason for which the trainer must refuse it; None where it must run.
    """

    name: str
    mesh: MeshShape
    strategies: tuple[str, ...]
    model: ModelConfig = LLAMA
    optimizer: OptimizerConfig = ADAMW
    settings: Mapping[str, Any] = field(default_factory=dict)
    precisions: tuple[str, ...] = (FLOAT64,)
    refused: str | None = None

    def run(self, precision: str) -> RunConfig:
        """The run in float32 or bfloat16; float64 is an execution of the float32 one."""
        precision = FLOAT32 if precision == FLOAT64 else precision
        settings = {"accumulation": self.microbatches, "precision": precision, **self.settings}
        return RunConfig(
            model=self.model,
            optimizer=self.optimizer,
            train=TrainConfig(batch=BATCH, seq=SEQ, steps=STEPS, mesh=self.mesh, **settings),
            data=DataConfig(),
        )

    @property
    def microbatches(self) -> int:
        """Enough to keep two stages busy, where there are stages."""
        return min(4, BATCH // self.mesh.batch_shards) if self.mesh.stage > 1 else 1


def _strategies(mesh: MeshShape) -> tuple[str, ...]:
    return tuple(axis.value for axis in Axis if mesh.size(axis) > 1)


def products() -> Iterator[Recipe]:
    """One device, and every axis, pair and triple of axes of size 2, in three precisions.

    A mesh with an expert axis trains the mixture.
    """
    for size in range(4):
        for axes in itertools.combinations(Axis, size):
            mesh = MeshShape(**{axis.value: 2 for axis in axes})
            yield Recipe(
                name=str(mesh) if axes else "one device",
                mesh=mesh,
                strategies=_strategies(mesh) or ALWAYS,
                model=MIXTURE if Axis.EXPERT in axes else LLAMA,
                precisions=PRECISIONS,
            )


def _variant(mesh: str, what: str = "", *also: str, **fields: Any) -> Recipe:
    """A recipe named for its mesh and what is special about it; `also` are strategies besides its axes."""
    shape = MeshShape.parse(mesh)
    return Recipe(name=f"{mesh} {what}".strip(), mesh=shape, strategies=(*_strategies(shape), *also), **fields)


def variants() -> tuple[Recipe, ...]:
    """Other sizes, settings and models of each strategy, in float64."""
    no_sequence = {"sequence_parallel": False}
    full, dots = {"remat": "full"}, {"remat": "dots"}
    return (
        _variant("data=8"),
        _variant("data=2", "4 microbatches", settings={"accumulation": 4}),
        _variant("data=2", "scan over layers, remat dots", settings={"unroll": 1, **dots}),
        _variant("data=2", "remat full", settings=full),
        _variant("data=4", "zero 1", "zero", settings={"zero": 1}),
        _variant("data=4", "zero 2", "zero", settings={"zero": 2}),
        _variant("data=2", "zero 2, 4 microbatches", "zero", settings={"zero": 2, "accumulation": 4}),
        _variant("data=2,tensor=2", "zero 1", "zero", settings={"zero": 1}),
        _variant("data=2,tensor=2", "zero 2", "zero", settings={"zero": 2}),
        _variant("data=2,fsdp=2", "zero 2", "zero", settings={"zero": 2}),
        _variant("data=2,expert=2", "zero 2", "zero", settings={"zero": 2}, model=MIXTURE),
        _variant("data=2,stage=2", "zero 2", "zero", settings={"zero": 2}),
        _variant("data=2", "GPT-2", model=GPT2, optimizer=SGD),
        _variant("fsdp=8"),
        _variant("fsdp=2", "4 microbatches", settings={"accumulation": 4}),
        _variant("fsdp=2", "remat full", settings=full),
        _variant("fsdp=2", "GPT-2", model=GPT2, optimizer=SGD),
        _variant("tensor=2", "no sequence parallelism", settings=no_sequence),
        _variant("tensor=2", "remat dots", "sequence", settings=dots),
        _variant("tensor=4", "GPT-2", "sequence", model=GPT2, optimizer=SGD, precisions=PRECISIONS),
        _variant("data=2,fsdp=2,tensor=2", "no sequence parallelism", settings=no_sequence),
        _variant("data=2,fsdp=2,tensor=2", "GPT-2", model=GPT2, optimizer=SGD),
        _variant("context=4", "ring"),
        _variant("context=2", "ulysses", settings={"context_attention": "ulysses"}),
        _variant("context=4", "ulysses", settings={"context_attention": "ulysses"}),
        _variant("context=2", "remat full", settings=full),
        _variant("context=2", "GPT-2", model=GPT2, optimizer=SGD),
        _variant("context=2,tensor=2", "ulysses", settings={"context_attention": "ulysses"}),
        _variant("fsdp=2,context=2", "ulysses", settings={"context_attention": "ulysses"}),
        _variant("expert=4", model=MIXTURE),
        _variant("expert=2", "nothing dropped", model=replace(MIXTURE, capacity_factor=None)),
        _variant("expert=2", "top 1", model=replace(MIXTURE, experts_per_token=1)),
        _variant("expert=2,tensor=2", "no sequence parallelism", settings=no_sequence, model=MIXTURE),
        _variant("expert=2,context=2", "ulysses", settings={"context_attention": "ulysses"}, model=MIXTURE),
        _variant("data=2", "experts on every device", "expert", model=MIXTURE),
        _variant("tensor=2", "experts on every device", "expert", model=MIXTURE),
        _variant("stage=2", "gpipe", settings={"pipeline_schedule": "gpipe"}),
        _variant("stage=2", "zero-bubble", settings={"pipeline_schedule": "zero-bubble"}),
        _variant(
            "stage=2", "interleaved", model=DEEP, settings={"pipeline_schedule": "interleaved", "pipeline_chunks": 2}
        ),
        _variant("stage=4", "1f1b", model=DEEP),
        _variant("stage=2", "GPT-2", model=GPT2, optimizer=SGD),
        _variant("stage=2", "remat full", settings=full),
        _variant("stage=2,tensor=2", "zero-bubble", settings={"pipeline_schedule": "zero-bubble"}),
        _variant("stage=2,context=2", "ulysses", settings={"context_attention": "ulysses"}),
        _variant("stage=2", "experts on every device", "expert", model=MIXTURE),
    )


def illegal() -> tuple[Recipe, ...]:
    """What the trainer must refuse, and a word of its reason."""
    return (
        _variant("expert=2", "without experts", refused="experts"),
        _variant("expert=8", "for 4 experts", model=MIXTURE, refused="experts=4"),
        _variant("tensor=8", "for 4 heads", refused="heads=4"),
        _variant("tensor=4", "for 2 key/value heads", refused="kv_heads=2"),
        _variant("fsdp=6", "for a model dim of 16", refused="dim=16"),
        _variant("stage=4", "for 2 layers", refused="layers=2"),
        _variant("stage=2", "with 1 microbatch", settings={"accumulation": 1}, refused="idle"),
        _variant(
            "data=2",
            "2 chunks without stages",
            refused="stage",
            settings={"pipeline_schedule": "interleaved", "pipeline_chunks": 2},
        ),
        _variant("context=6", "for 16 tokens", refused="seq"),
        _variant("context=8", "ulysses for 4 heads", settings={"context_attention": "ulysses"}, refused="heads"),
        _variant("data=6", "for 8 sequences", refused="batch=8"),
    )


def recipes() -> tuple[Recipe, ...]:
    """Every row of the trainer."""
    return (*products(), *variants(), *illegal())

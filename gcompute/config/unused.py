"""Settings that a run has no use for: refused where they were given, so that none is ignored in silence."""

from collections.abc import Collection
from dataclasses import fields
from typing import Any

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.train import OPTIMIZERS, RunConfig

# Which of these an optimizer reads; the rest of OptimizerConfig serves every optimizer.
OPTIMIZER_FIELDS = {
    "adamw": ("weight_decay", "b1", "b2", "eps"),
    "muon": ("weight_decay", "b1", "b2", "eps"),
    "lion": ("weight_decay", "b1", "b2"),
    "adafactor": ("weight_decay",),
    "adam": ("b1", "b2", "eps"),
    "nadamw": ("weight_decay", "b1", "b2", "eps"),
    "lamb": ("weight_decay", "b1", "b2", "eps"),
    "sgd": ("weight_decay", "b1"),
}
# What says how a mesh axis is used, and so nothing where its size is 1. Their defaults ask for nothing, and a file that
# lists every field may serve a laptop too.
AXIS_FIELDS = {
    "zero": Axis.DATA,
    "context_attention": Axis.CONTEXT,
    "pipeline_schedule": Axis.STAGE,
}
EXPERT_FIELDS = ("experts_per_token", "balance_weight")


def unused(run: RunConfig, names: Collection[str], mesh: MeshShape | None) -> dict[str, str]:
    """Why each of the settings in `names` changes nothing in `run`, by name; those with an effect are left out.

    A setting that asks for nothing is never listed: weight_decay=0, or the default of what a mesh axis or experts use.

    Args:
      names: fields of the run's parts that somebody gave. mesh: where it runs; None: not known yet, so the settings of
        mesh axes are left out.
    """
    optimizer, train = run.optimizer, run.train
    reasons: dict[str, str] = {}
    for name in ("weight_decay", "b1", "b2", "eps"):
        value = getattr(optimizer, name)
        if value and name not in OPTIMIZER_FIELDS[optimizer.optimizer]:
            others = ", ".join(other for other in OPTIMIZERS if name in OPTIMIZER_FIELDS[other])
            reasons[name] = f"{name}={value:g} has no effect with optimizer={optimizer.optimizer}, only with {others}"
    if optimizer.schedule == "constant" and optimizer.final_fraction != 1:
        reasons["final_fraction"] = (
            f"final_fraction={optimizer.final_fraction:g} has no effect with schedule=constant, which never decays"
        )
    if optimizer.warmup_fraction is not None:
        reasons["warmup_steps"] = (
            f"warmup_steps={optimizer.warmup_steps} has no effect with"
            f" warmup_fraction={optimizer.warmup_fraction:g}, which says the same"
        )
    if run.data.validation is not None:
        reasons["val_fraction"] = (
            f"val_fraction={run.data.val_fraction:g} has no effect with validation={run.data.validation}: all of data"
            " trains"
        )
    if train.keep_best and not train.eval_every:
        reasons["keep_best"] = "keep_best has no effect with eval_every=0, which evaluates at the end alone"
    if train.sample_prompt is not None and not train.sample_every:
        reasons["sample_prompt"] = "sample_prompt has no effect with sample_every=0, which takes no samples"
    if run.model.experts is None:
        for name in (name for name in EXPERT_FIELDS if getattr(run.model, name) != _default(run.model, name)):
            reasons[name] = f"{name}={getattr(run.model, name)} has no effect on a model without experts"
    for name, axis in AXIS_FIELDS.items():
        value = getattr(train, name)
        if mesh is not None and mesh.size(axis) == 1 and value != _default(train, name):
            reasons[name] = f"{name}={value} has no effect on mesh {mesh}, where {axis}=1"
    return {name: reason for name, reason in reasons.items() if name in names}


def _default(config: Any, name: str) -> Any:
    return next(field.default for field in fields(config) if field.name == name)


def check_used(run: RunConfig, names: Collection[str]) -> None:
    """Refuse settings that were given and change nothing; a mesh that was left open is not judged.

    Raises:
      ValueError: one of `names` has no effect in `run`, with why.
    """
    for reason in unused(run, names, run.train.mesh).values():
        raise ValueError(f"{reason}. Leave it away, or change what goes with it.")

"""Rows of data parallelism and ZeRO: train steps of a small regression, against its steps written out."""

from typing import Any

import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from gcompute.certify.collectives import Expected, expect
from gcompute.certify.explicit import Case, Function, integers
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.data import jit_step, pmap_step, shard_map_step
from gcompute.parallel.zero import automatic_zero_step, zero_step
from gcompute.parallel.zero_layout import shard_specs

ROWS, D, OUT = 16, 8, 4
# Powers of two: with small integers every number of two steps is exact in float32.
RATE, MOMENTUM, STEPS = 2.0**-3, 0.5, 2


def _loss(params: Any, batch: Any) -> Any:
    """Mean over rows of the squared residuals of x w + bias."""
    residual = batch["x"] @ params["w"] + params["bias"] - batch["y"]
    return (residual**2).sum(axis=-1).mean()


def _arguments() -> tuple[Any, Any]:
    params = {"w": integers(0, D, OUT, most=1), "bias": integers(1, OUT, most=1)}
    return params, {"x": integers(2, ROWS, D, most=1), "y": integers(3, ROWS, OUT, most=1)}


def _by_hand(params: Any, batch: Any) -> Any:
    """d loss / d w = 2/B x^T residual, d loss / d bias = 2/B sum of residuals; m = g + momentum m, p -= rate m."""
    w, bias = params["w"], params["bias"]
    moment_w, moment_bias, losses = jnp.zeros_like(w), jnp.zeros_like(bias), []
    for _ in range(STEPS):
        residual = batch["x"] @ w + bias - batch["y"]
        losses.append((residual**2).sum() / ROWS)
        moment_w = 2 / ROWS * batch["x"].T @ residual + MOMENTUM * moment_w
        moment_bias = 2 / ROWS * residual.sum(axis=0) + MOMENTUM * moment_bias
        w, bias = w - RATE * moment_w, bias - RATE * moment_bias
    return {"w": w, "bias": bias}, losses


def _steps(step: Function) -> Function:
    def run(params: Any, batch: Any) -> Any:
        state, losses = optax.sgd(RATE, MOMENTUM).init(params), []
        for _ in range(STEPS):
            params, state, loss = step(params, state, batch)
            losses.append(loss)
        return params, losses

    return run


def _case(
    name: str,
    mesh: MeshShape,
    step_of: Function,
    strategies: tuple[str, ...],
    expected: dict[Axis, Expected],
    **options: bool,
) -> Case:
    def build(on: Mesh) -> Function:
        return _steps(step_of(_loss, optax.sgd(RATE, MOMENTUM), on))

    return Case(
        name=name,
        certifies=(name.split()[0],),
        strategies=strategies,
        mesh=mesh,
        build=build,
        reference=_by_hand,
        arguments=_arguments,
        expected=expected,
        differentiable=False,
        **options,
    )


def _zero_case(notation: str, stage: int, accumulation: int, *, hybrid: bool = False) -> Case:
    builder = {"zero_step": zero_step, "automatic_zero_step": automatic_zero_step}[notation]
    replicas = (Axis.DATA,) if hybrid else ()

    def step_of(loss: Function, optimizer: Any, on: Mesh) -> Function:
        specs = shard_specs(_arguments()[0], on)
        return builder(loss, optimizer, on, specs, stage=stage, accumulation=accumulation, replicas=replicas)

    # XLA on CPU makes an all-reduce and a slice of what is a reduce-scatter elsewhere.
    scatter = "reduce-scatter" if notation == "zero_step" else "reduce-scatter|all-reduce"
    expected = {Axis.FSDP: expect("all-gather", scatter, also="all-reduce")}
    if hybrid:
        expected[Axis.DATA] = expect("all-reduce")
    mesh = MeshShape(data=2, fsdp=2) if hybrid else MeshShape(fsdp=4)
    what = f"stage {stage}{', hybrid' if hybrid else ''}, {accumulation} microbatches"
    return _case(f"zero.{notation} {what}", mesh, step_of, ("zero", Axis.FSDP.value), expected)


def cases() -> list[Case]:
    """Every train step of data and zero."""
    rows = []
    for accumulation in (1, 4):
        for name, builder in (("shard_map_step", shard_map_step), ("jit_step", jit_step)):

            def step_of(
                loss: Function, optimizer: Any, on: Mesh, builder: Any = builder, accumulation: int = accumulation
            ) -> Function:
                return builder(loss, optimizer, on, accumulation=accumulation)

            what = f"data.{name} {accumulation} microbatch{'es' if accumulation > 1 else ''}"
            mesh, one = MeshShape(data=4), {Axis.DATA: expect("all-reduce")}
            rows.append(_case(what, mesh, step_of, (Axis.DATA.value,), one))
    rows.append(
        _case(
            "data.pmap_step",
            MeshShape(data=4),
            lambda loss, optimizer, on: pmap_step(loss, optimizer, devices=list(on.devices.flat)),
            (Axis.DATA.value,),
            {},
            compiles_itself=True,
        )
    )
    for notation in ("zero_step", "automatic_zero_step"):
        rows += [_zero_case(notation, stage, 2) for stage in (1, 2, 3)]
    return [*rows, _zero_case("zero_step", 3, 2, hybrid=True), _zero_case("automatic_zero_step", 3, 2, hybrid=True)]

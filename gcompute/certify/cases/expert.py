"""Rows of the mixture of experts, against the reference's: an expert at a time over all tokens of a sequence."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gcompute.certify.cases.context import positions_of
from gcompute.certify.collectives import Expected, expect
from gcompute.certify.explicit import Case, Function, normals
from gcompute.certify.reference import experts
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.parallel.expert import ExpertAxes, automatic_mixture, dense_mixture, mixture

B, T, D, E, F = 8, 16, 4, 4, 8
TIGHT = ModelConfig(vocab=8, layers=1, dim=D, heads=1, ffn=F, experts=E, experts_per_token=2, capacity_factor=0.75)
ROOMY = ModelConfig(vocab=8, layers=1, dim=D, heads=1, ffn=F, experts=E, experts_per_token=2)
ONE = ModelConfig(vocab=8, layers=1, dim=D, heads=1, ffn=F, experts=E, experts_per_token=1, capacity_factor=0.75)
UP, DOWN = ("up_EDF", "gate_EDF"), "down_EFD"


def _arguments(order: np.ndarray) -> tuple[Any, Any]:
    shapes = {"router_DE": (D, E), "up_EDF": (E, D, F), "gate_EDF": (E, D, F), "down_EFD": (E, F, D)}
    return normals(0, B, T, D)[:, order], {
        name: normals(n, *shape) for n, (name, shape) in enumerate(shapes.items(), 1)
    }


def _reference(x: Any, weights: Any, config: ModelConfig, order: np.ndarray) -> Any:
    y, balance, dropped = jax.vmap(lambda sequence: experts(sequence, weights, config))(x[:, np.argsort(order)])
    return {"y": y[:, order], "balance": balance.mean(), "dropped": dropped.sum().astype(y.dtype)}


def _layer(run: Function, config: ModelConfig, x: Any, weights: Any, **options: Any) -> Any:
    def of_experts(x_EBCD: Any) -> Any:
        up, gate = (jnp.einsum("ebcd,edf->ebcf", x_EBCD, weights[name]) for name in UP)
        return jnp.einsum("ebcf,efd->ebcd", jax.nn.silu(gate) * up, weights[DOWN])

    y, stats = run(x, weights["router_DE"], of_experts, k=config.experts_per_token, compute=x.dtype, **options)
    return {"y": y, "balance": stats.balance, "dropped": stats.dropped.astype(y.dtype)}


def cases() -> list[Case]:
    """Per-device dispatch over each axis that takes part, the automatic form and the dense fallback."""

    def case(
        name: str,
        what: str,
        mesh: MeshShape,
        config: ModelConfig,
        build: Function,
        expected: dict[Axis, Expected],
        order: np.ndarray | None = None,
    ) -> Case:
        order = np.arange(T) if order is None else order
        return Case(
            name=f"expert.{name} {what}".strip(),
            certifies=(f"expert.{name}",),
            strategies=(
                Axis.EXPERT.value,
                *(axis.value for axis in Axis if axis != Axis.EXPERT and mesh.size(axis) > 1),
            ),
            mesh=mesh,
            build=build,
            reference=partial(_reference, config=config, order=order),
            arguments=partial(_arguments, order),
            expected=expected,
            exact=False,
            under_mesh=name == "automatic_mixture",
        )

    def explicit(mesh: MeshShape, config: ModelConfig, layout: str = "contiguous", scatter: bool = False) -> Function:
        used = {axis: axis if mesh.size(axis) > 1 else None for axis in Axis}
        rows = tuple(axis for axis in (Axis.DATA, Axis.FSDP, Axis.EXPERT) if used[axis]) or None
        axes = ExpertAxes(
            expert=used[Axis.EXPERT],
            tensor=used[Axis.TENSOR],
            context=used[Axis.CONTEXT],
            batch=rows or (),
            layout=layout,  # pyright: ignore[reportArgumentType]
            scatter=scatter,
        )
        up = P(used[Axis.EXPERT], None, used[Axis.TENSOR])
        weights = {"router_DE": P(), "up_EDF": up, "gate_EDF": up, DOWN: P(used[Axis.EXPERT], used[Axis.TENSOR])}
        tokens, capacity = P(rows, used[Axis.CONTEXT]), None if config.capacity_factor is None else config.capacity(T)
        out = P(rows, used[Axis.TENSOR]) if scatter else tokens
        run = partial(_layer, mixture, config, capacity=capacity, axes=axes)

        def build(on: Mesh) -> Function:
            return jax.shard_map(
                run, mesh=on, in_specs=(tokens, weights), out_specs={"y": out, "balance": P(), "dropped": P()}
            )

        return build

    two_way, reduced = expect("all-to-all", also="all-reduce"), expect("all-reduce")
    shared = expect("all-gather", "reduce-scatter", also="all-reduce")
    expert4, zigzag = MeshShape(expert=4), positions_of("zigzag")
    with_tensor, with_context = MeshShape(expert=2, tensor=2), MeshShape(expert=2, context=4)
    return [
        case("mixture", "places for 3/4", expert4, TIGHT, explicit(expert4, TIGHT), {Axis.EXPERT: two_way}),
        case("mixture", "nothing dropped", expert4, ROOMY, explicit(expert4, ROOMY), {Axis.EXPERT: two_way}),
        case("mixture", "top 1", expert4, ONE, explicit(expert4, ONE), {Axis.EXPERT: two_way}),
        case(
            *("mixture", "x tensor", with_tensor, TIGHT, explicit(with_tensor, TIGHT)),
            {Axis.EXPERT: two_way, Axis.TENSOR: reduced},
        ),
        case(
            *("mixture", "x tensor, scattered", with_tensor, TIGHT, explicit(with_tensor, TIGHT, scatter=True)),
            {Axis.EXPERT: two_way, Axis.TENSOR: expect("reduce-scatter", "all-gather", also="all-reduce")},
        ),
        case(
            *("mixture", "x context, zigzag", with_context, TIGHT, explicit(with_context, TIGHT, "zigzag")),
            {Axis.EXPERT: two_way, Axis.CONTEXT: shared},
            zigzag,
        ),
        case(
            *("automatic_mixture", "places for 3/4", expert4, TIGHT),
            lambda on: partial(_layer, automatic_mixture, TIGHT, capacity=TIGHT.capacity(T)),
            {Axis.EXPERT: expect("all-to-all", also="all-reduce|all-gather")},
        ),
        case("dense_mixture", "", MeshShape(), ROOMY, lambda on: partial(_layer, dense_mixture, ROOMY), {}),
    ]

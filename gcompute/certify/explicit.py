"""The library's rows: each function of `gcompute.parallel`, forward and backward, against what it says it computes."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gcompute.aot.hlo import read_collectives
from gcompute.certify.collectives import Expected, breaches, tally
from gcompute.certify.evidence import Check, Row, compare
from gcompute.certify.precision import FLOAT32, FLOAT64, precision_of
from gcompute.certify.session import Session
from gcompute.config.mesh import Axis, MeshShape
from gcompute.parallel.mesh import build_mesh, use_mesh

FORM = "explicit"
CPU = "cpu"
# One layer's worth of the chain that the trainer's limit counts.
FLOAT64_LIMIT = 1e-12
# How the table writes a comparison of bits.
EXACT = "bits"

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One function on a mesh.

    certifies: the functions, as module and name under gcompute.parallel. build: from a mesh to a function of whole
    arrays that runs it there. reference: the same function by the textbook. arguments: whole arrays; those of integers
    get no gradient.
    under_mesh: trace it inside `use_mesh`, as code that names no mesh needs.
    compiles_itself: it cannot be compiled from outside, so that neither its collectives nor its compilations are seen.
    exact: they are small integers in float32, whose sums come out the same in any order, and every bit must agree;
    otherwise float64. expected: collectives of the forward and backward pass together, by axis.
    """

    name: str
    certifies: tuple[str, ...]
    strategies: tuple[str, ...]
    mesh: MeshShape
    build: Callable[[Mesh], Function]
    reference: Function
    arguments: Callable[[], tuple[Any, ...]]
    expected: Mapping[Axis, Expected] = field(default_factory=dict)
    under_mesh: bool = False
    compiles_itself: bool = False
    exact: bool = True
    differentiable: bool = True


def spread(function: Function, in_specs: Any, out_specs: Any) -> Callable[[Mesh], Function]:
    """A builder that runs `function`, per-device code, on the shards that the specs say."""

    def build(mesh: Mesh) -> Function:
        return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)

    return build


def integers(seed: int, *shape: int, most: int = 2) -> np.ndarray:
    """Whole numbers from -most to most, as float32."""
    return np.random.default_rng(seed).integers(-most, most + 1, shape).astype(np.float32)


def normals(seed: int, *shape: int) -> np.ndarray:
    """Normal values, as float64."""
    return np.random.default_rng(seed).standard_normal(shape)


def explicit_row(case: Case, session: Session) -> Row:
    """Run the case and its reference, and compare; a program that cannot be built or run is a red row too."""
    started = time.perf_counter()
    fields: dict[str, Any] = {}
    try:
        with precision_of(FLOAT32 if case.exact else FLOAT64):
            fields = _run(case, session)
    except Exception as error:  # Whatever stops a program is what its row has to say.
        fields["faults"] = (f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",)
    return Row(name=case.name, form=FORM, strategies=case.strategies, seconds=time.perf_counter() - started, **fields)


def with_gradients(function: Function, differentiable: bool) -> Function:
    """(cotangent, *arguments) -> output and the cotangent pulled back to every argument that is not of integers."""

    def run(dy: Any, *arguments: Any) -> dict[str, Any]:
        if not differentiable:
            return {"output": function(*arguments)}
        leaves, structure = jax.tree.flatten(arguments)
        floats = [np.issubdtype(leaf.dtype, np.floating) for leaf in leaves]

        def of_floats(*values: Any) -> Any:
            left = iter(values)
            merged = [next(left) if is_float else leaf for leaf, is_float in zip(leaves, floats, strict=True)]
            return function(*structure.unflatten(merged))

        y, pull = jax.vjp(of_floats, *(leaf for leaf, is_float in zip(leaves, floats, strict=True) if is_float))
        return {"output": y, "gradients": pull(dy)}

    return run


def lower_case(case: Case, devices: Sequence[Any] | None = None) -> tuple[jax.stages.Lowered, Mesh]:
    """The case's program, forward and backward, before it is compiled, and the mesh that it is for."""
    mesh = build_mesh(case.mesh, devices)
    function, arguments = case.build(mesh), case.arguments()
    with use_mesh(mesh) if case.under_mesh else nullcontext():
        dy = _cotangent(case, jax.eval_shape(function, *arguments))
        return jax.jit(with_gradients(function, case.differentiable)).lower(dy, *arguments), mesh


def _cotangent(case: Case, shapes: Any) -> Any:
    draw = integers if case.exact else normals
    leaves, structure = jax.tree.flatten(shapes)
    return structure.unflatten([np.asarray(draw(99 + n, *leaf.shape), leaf.dtype) for n, leaf in enumerate(leaves)])


def _run(case: Case, session: Session) -> dict[str, Any]:
    arguments = case.arguments()
    dy = _cotangent(case, jax.eval_shape(case.reference, *arguments))
    truth = _flat(jax.jit(with_gradients(case.reference, case.differentiable))(dy, *arguments))
    if case.compiles_itself:
        function = with_gradients(case.build(build_mesh(case.mesh)), case.differentiable)
        with session.running:
            return {"checks": tuple(_checks(case, _flat(function(dy, *arguments)), truth))}
    lowered, mesh = lower_case(case)
    before = session.counter.count
    compiled = lowered.compile()
    with session.running:
        found = [_flat(compiled(dy, *arguments)) for _ in range(2)][-1]
    compilations = session.counter.count - before
    collectives = tally(read_collectives(compiled, mesh), mesh)
    wrong = breaches(collectives, {axis.value: kinds for axis, kinds in case.expected.items()}, CPU)
    if compilations != 1:
        wrong.append(f"{compilations} compilations where there should be one")
    return {
        "checks": tuple(_checks(case, found, truth)),
        "collectives": {CPU: collectives.counts},
        "compilations": compilations,
        "faults": tuple(wrong),
    }


def _checks(case: Case, found: dict[str, np.ndarray], truth: dict[str, np.ndarray]) -> list[Check]:
    checks = []
    for quantity in ("output", "gradients"):
        ours, theirs = ({k: v for k, v in tree.items() if k.startswith(quantity)} for tree in (found, truth))
        if theirs:
            limit = 0.0 if case.exact else FLOAT64_LIMIT
            checks.append(compare(quantity, ours, theirs, precision=EXACT if case.exact else FLOAT64, limit=limit))
    return checks


def _flat(tree: Any) -> dict[str, np.ndarray]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in pairs}

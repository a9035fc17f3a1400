"""Which collectives a program must hold and must not, axis by axis, and what it holds."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from jax.sharding import Mesh

from gcompute.aot.device_groups import axes_between, positions_in_mesh
from gcompute.aot.hlo import Collective

# What several axes share, as in an all-reduce over data and fsdp at once, is written with this between them.
TOGETHER = "+"
# Groups of half an axis, say.
IN_PARTS = " in parts"


# What else XLA for TPU makes of a collective: of a reduce-scatter of few bytes an all-reduce and a slice, and of a
# gather before a product or a scatter after one a ring of permutations that hides behind it (Wang et al. 2023).
ON_TPU = {
    "reduce-scatter": frozenset({"all-reduce", "collective-permute"}),
    "all-gather": frozenset({"collective-permute"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """Collectives along one mesh axis. must: one kind out of each group. only: the kinds that may appear at all."""

    must: tuple[frozenset[str], ...] = ()
    only: frozenset[str] = frozenset()

    def on_tpu(self) -> "Expected":
        """The same for a program that the TPU compiler has made."""

        def widened(kinds: frozenset[str]) -> frozenset[str]:
            return kinds.union(*(ON_TPU.get(kind, frozenset()) for kind in kinds))

        return replace(self, must=tuple(map(widened, self.must)), only=widened(self.only))


@dataclass(frozen=True, slots=True)
class Found:
    """Counts of one compiled program: {"data": {"all-reduce": 3}}, each instruction once however often it runs."""

    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def kinds(self, axis: str) -> set[str]:
        """The kinds that run along `axis`, alone or with others.

        Left out is a permutation over several axes at once: with it XLA moves an array from a split over one axis to a
        split over another, which belongs to neither.
        """
        return {
            kind
            for axes, kinds in self.counts.items()
            if axis in _names(axes)
            for kind in kinds
            if not (kind == "collective-permute" and TOGETHER in axes)
        }


def expect(*must: str, also: str = "") -> Expected:
    """Each argument is "kind" or "kind|kind", one of which must appear; `also` lists kinds that may.

    >>> sorted(expect("all-gather", "all-reduce|reduce-scatter").only)
    ['all-gather', 'all-reduce', 'reduce-scatter']
    """
    groups = tuple(frozenset(group.split("|")) for group in must)
    return Expected(must=groups, only=frozenset().union(*groups, filter(None, also.split("|"))))


def _names(axes: str) -> list[str]:
    return axes.removesuffix(IN_PARTS).split(TOGETHER)


def tally(collectives: Iterable[Collective], mesh: Mesh) -> Found:
    """Counts by axes and kind.

    Left out is what moves nothing between devices (a permutation onto itself), and how a device finds its own place on
    JAX 0.7 (`gcompute.parallel.collectives.axis_index`): that is no part of what a strategy communicates.
    """
    counts: dict[str, dict[str, int]] = {}
    positions = positions_in_mesh(mesh, mesh.size)
    for collective in collectives:
        whole = collective.axes
        axes = TOGETHER.join((axes_between(collective.groups, mesh, positions) or ()) if whole is None else whole)
        if axes and not _finds_its_place(collective):
            kinds = counts.setdefault(axes if whole is not None else axes + IN_PARTS, {})
            kinds[collective.kind] = kinds.get(collective.kind, 0) + 1
    return Found(counts)


def _finds_its_place(collective: Collective) -> bool:
    one_integer = collective.dtype in ("s32", "s64") and collective.result_bytes <= 8
    return collective.kind == "reduce-scatter" and one_integer


def breaches(found: Found, expected: Mapping[str, Expected], place: str) -> list[str]:
    """A sentence for each collective that is missing, and for each that should not be there."""
    wrong = []
    for axis, wanted in expected.items():
        kinds = found.kinds(axis)
        for group in wanted.must:
            if not kinds & group:
                wrong.append(f"on {place} nothing along {axis} is {' or '.join(sorted(group))}")
        for kind in sorted(kinds - wanted.only):
            wrong.append(f"on {place} there is a {kind} along {axis}, which has no business there")
    others = {axis for axes in found.counts for axis in _names(axes)} - set(expected)
    wrong += [f"on {place} there are collectives along {axis}, which splits nothing" for axis in sorted(others)]
    return wrong

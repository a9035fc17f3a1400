"""The house rules that a parser can hold: imports, where shard_map and mesh axes are named, module names and sizes.

Every rule is a function of (path, source), so each is also tried on a source that breaks it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcompute
from gcompute.config.mesh import Axis

PACKAGE = Path(gcompute.__file__).parent
# Lowest first. A package may import those before it.
LAYERS = (
    *("config", "hardware", "plan", "exam", "vectorize", "measure", "aot", "parallel", "model", "train", "serve"),
    *("diagnose", "certify", "lab", "cli"),
)
STRANGERS = {"train", "serve"}
JAX_FREE_LAYERS = {"hardware", "config", "plan", "exam"}
NO_ARRAYS = ("blocks", "buckets", "limits", "position", "request", "scheduler", "watch", "work")
JAX_FREE_MODULES = {f"serve/{name}.py" for name in NO_ARRAYS}
JAX_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
AXIS_LAYERS = {"plan", "parallel", "model", "train", "serve"}
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
MAX_LINES = 400
# "data" and "context" are also words of HTTP answers and configuration: they are axes where something takes an axis.
WORDS = {Axis.DATA.value, Axis.CONTEXT.value}
TAKES_AXES = {
    *(
        "P",
        "PartitionSpec",
        "NamedSharding",
        "Mesh",
        "make_mesh",
        "AbstractMesh",
        "shard_map",
        "axis_index",
        "axis_size",
    ),
    *("psum", "pmean", "pmax", "pmin", "psum_scatter", "all_gather", "all_to_all", "ppermute", "pvary", "pcast"),
}
TAKES_AXES_BY_KEYWORD = {"axis_name", "axis_names", "axis", "mesh_axis"}


def layer_of(path: str) -> str | None:
    """The package that a path such as "train/loop.py" lies in, None at the top."""
    return path.split("/")[0] if "/" in path else None


def imported(path: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of every import of a module at `path`, relative ones made absolute."""
    package = ["gcompute", *path.removesuffix(".py").split("/")[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            yield base, node.lineno
            # "from gcompute import train" names a package after "import".
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def import_directions(path: str, source: str) -> list[str]:
    layer, found = layer_of(path), []
    if layer is not None and layer not in LAYERS:
        return [f"{path}: package {layer!r} is not one of the layers"]
    for name, line in imported(path, ast.parse(source)):
        parts = name.split(".")
        if parts[0] != "gcompute" or len(parts) < 2:
            continue
        target = parts[1]
        if target not in LAYERS or target == layer:
            continue
        if layer is None:
            if path != "__main__.py":
                found.append(f"{path}:{line} imports {name}: the top of the package holds the version alone")
        elif {layer, target} == STRANGERS:
            found.append(f"{path}:{line} imports {name}: train and serve do not know each other")
        elif LAYERS.index(target) > LAYERS.index(layer):
            found.append(f"{path}:{line} imports {name}: {layer} lies below {target}")
    return found


def no_jax(path: str, source: str) -> list[str]:
    if layer_of(path) not in JAX_FREE_LAYERS and path not in JAX_FREE_MODULES:
        return []
    return [
        f"{path}:{line} imports {name}: this module never loads JAX"
        for name, line in imported(path, ast.parse(source))
        if name.split(".")[0] in JAX_PACKAGES
    ]


def shard_map_stays_in_parallel(path: str, source: str) -> list[str]:
    # The certificate runs per-device functions as a user's own program does.
    if layer_of(path) in ("parallel", "certify"):
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        names = {getattr(node, "id", None), getattr(node, "attr", None)}
        if isinstance(node, ast.alias):
            names |= {*node.name.split("."), node.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= set(node.module.split("."))
        if "shard_map" in names:
            found.append(f"{path}:{node.lineno} uses shard_map: it stays under parallel/")
    return sorted(set(found))


def _docstrings(tree: ast.AST) -> set[int]:
    """Ids of the constants that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, owners) and node.body and isinstance(node.body[0], ast.Expr)
    }


def _where_axes_go(tree: ast.AST) -> set[int]:
    """Ids of the nodes inside arguments and subscripts that are axes."""
    places: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in TAKES_AXES:
                places += [*node.args, *(keyword.value for keyword in node.keywords)]
            places += [keyword.value for keyword in node.keywords if keyword.arg in TAKES_AXES_BY_KEYWORD]
        elif isinstance(node, ast.Subscript) and getattr(node.value, "attr", None) == "shape":
            places.append(node.slice)
    return {id(inner) for place in places for inner in ast.walk(place)}


def axes_by_name(path: str, source: str) -> list[str]:
    if layer_of(path) not in AXIS_LAYERS:
        return []
    tree = ast.parse(source)
    docstrings, axis_places = _docstrings(tree), _where_axes_go(tree)
    return [
        f"{path}:{node.lineno} spells mesh axis {node.value!r}: use Axis.{node.value.upper()}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value in list(Axis)
        and id(node) not in docstrings
        and (node.value not in WORDS or id(node) in axis_places)
    ]


def named_for_a_concept(path: str, source: str) -> list[str]:
    vague = VAGUE_NAMES & {part.removesuffix(".py").strip("_") for part in path.split("/")}
    return [f"{path}: {name!r} names no concept" for name in sorted(vague)]


def short_enough(path: str, source: str) -> list[str]:
    num_lines = len(source.splitlines())
    return [f"{path}: {num_lines} lines, and {MAX_LINES} is the most"] if num_lines > MAX_LINES else []


def version_alone(path: str, source: str) -> list[str]:
    if path != "__init__.py":
        return []
    body = ast.parse(source).body
    kept = [node for node in body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if len(kept) == 1 and isinstance(kept[0], ast.Assign) and ast.unparse(kept[0].targets[0]) == "__version__":
        return []
    return [f"{path} holds more than the version"]


RULES = (
    import_directions,
    no_jax,
    shard_map_stays_in_parallel,
    axes_by_name,
    named_for_a_concept,
    short_enough,
    version_alone,
)


def loads_jax_through(sources: dict[str, str]) -> list[str]:
    """Chains by which a module that never loads JAX would load it: imports at the top level, through other modules."""
    edges: dict[str, set[str]] = {}
    for path, source in sources.items():
        tree = ast.Module(body=list(_at_import_time(ast.parse(source).body)), type_ignores=[])
        edges[path] = set()
        for name, _ in imported(path, tree):
            if name.split(".")[0] in JAX_PACKAGES:
                edges[path].add(name.split(".")[0])
            edges[path] |= {file for file in _files(name) if file in sources}
    found = []
    for start in sorted(sources):
        if layer_of(start) not in JAX_FREE_LAYERS and start not in JAX_FREE_MODULES:
            continue
        # Importing a module also runs the __init__ of its packages.
        waiting, seen = [(start,), *((start, file) for file in _files_above(start) if file in sources)], {start}
        while waiting:
            chain = waiting.pop()
            for target in sorted(edges.get(chain[-1], ())):
                if target in JAX_PACKAGES:
                    found.append(" -> ".join((*chain, target)))
                elif target not in seen:
                    seen.add(target)
                    waiting.append((*chain, target))
    return found


def _at_import_time(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that importing runs: not those of functions, nor those for type checkers."""
    for node in body:
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
                yield from _at_import_time(node.body)
            for extra in ("orelse", "finalbody"):
                yield from _at_import_time(getattr(node, extra, []))
            for handler in getattr(node, "handlers", []):
                yield from _at_import_time(handler.body)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node


def _files(name: str) -> set[str]:
    """The files that importing a dotted name runs, as far as they exist."""
    parts = name.split(".")
    if parts[0] != "gcompute":
        return set()
    inner = "/".join(parts[1:])
    return {f"{inner}.py", f"{inner}/__init__.py" if inner else "__init__.py", *_files_above(f"{inner}.py")}


def _files_above(path: str) -> set[str]:
    parts = path.split("/")[:-1]
    return {"/".join([*parts[: index + 1], "__init__.py"]) for index in range(len(parts))}


def sources_here() -> dict[str, str]:
    return {
        str(path.relative_to(PACKAGE).as_posix()): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")
    }


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule):
    sources = sources_here()
    assert {"__init__.py", "config/mesh.py"} <= set(sources)
    assert [line for path, source in sorted(sources.items()) for line in rule(path, source)] == []


def test_no_chain_of_imports_loads_jax():
    assert loads_jax_through(sources_here()) == []


BROKEN = [
    (import_directions, "plan/memory.py", "from gcompute.model.transformer import init"),
    (import_directions, "plan/memory.py", "import gcompute.measure.timing as t"),
    (import_directions, "model/layers.py", "from gcompute import train"),
    (import_directions, "model/layers.py", "from ..train import loop"),
    (import_directions, "serve/engine.py", "def f():\n    from gcompute.train.data import read"),
    (import_directions, "train/loop.py", "import gcompute.serve.engine"),
    (import_directions, "parallel/mesh.py", "from gcompute.cli.main import main"),
    (import_directions, "extras/thing.py", ""),
    (import_directions, "__init__.py", "from gcompute.model import transformer"),
    (no_jax, "plan/memory.py", "import jax.numpy as jnp"),
    (no_jax, "config/model.py", "def f():\n    from flax import nnx"),
    (no_jax, "serve/scheduler.py", "import optax"),
    (no_jax, "hardware/chips.py", "import orbax.checkpoint"),
    (shard_map_stays_in_parallel, "train/step.py", "from jax import shard_map"),
    (shard_map_stays_in_parallel, "train/step.py", "from jax.experimental.shard_map import shard_map as sm"),
    (shard_map_stays_in_parallel, "model/attention.py", "import jax\nf = jax.shard_map(g)"),
    (axes_by_name, "train/step.py", "axis = 'fsdp'"),
    (axes_by_name, "parallel/rules.py", 'RULES = {"D": ("tensor",)}'),
    (axes_by_name, "model/attention.py", 'spec = P(("data", None), "B")'),
    (axes_by_name, "parallel/ring.py", 'jax.lax.psum(x, "context")'),
    (axes_by_name, "parallel/ring.py", 'f(x, axis_name="data")'),
    (axes_by_name, "train/loop.py", 'n = mesh.shape["data"]'),
    (named_for_a_concept, "train/utils.py", ""),
    (named_for_a_concept, "train/_helpers.py", ""),
    (named_for_a_concept, "model/common/layers.py", ""),
    (short_enough, "train/loop.py", "x = 1\n" * (MAX_LINES + 1)),
    (version_alone, "__init__.py", '__version__ = "1"\nimport os'),
    (version_alone, "__init__.py", ""),
]


@pytest.mark.parametrize(("rule", "path", "source"), BROKEN)
def test_rule_catches_a_breach(rule, path, source):
    assert rule(path, source) != []


SOUND = [
    (import_directions, "__main__.py", "from gcompute.cli.main import main"),
    (
        import_directions,
        "train/loop.py",
        "from gcompute import __version__\nfrom gcompute.plan.params import count_params",
    ),
    (import_directions, "train/loop.py", "from .data import read\nimport jax"),
    (
        import_directions,
        "lab/runner.py",
        "from gcompute.serve.engine import Engine\nfrom gcompute.train.loop import train",
    ),
    (no_jax, "serve/engine.py", "import jax"),
    (no_jax, "plan/memory.py", '"""Never imports jax."""\nimport math'),
    (shard_map_stays_in_parallel, "parallel/ring.py", "from jax import shard_map"),
    (shard_map_stays_in_parallel, "train/step.py", '"""Not by shard_map."""'),
    (axes_by_name, "config/mesh.py", 'FSDP = "fsdp"'),
    (axes_by_name, "serve/api.py", 'answer = {"object": "list", "data": []}\nlength = sizes["context"]'),
    (axes_by_name, "train/step.py", 'def f():\n    """tensor"""\n    return P(Axis.DATA)'),
    (named_for_a_concept, "train/loop.py", ""),
    (short_enough, "train/loop.py", "x = 1\n" * MAX_LINES),
    (version_alone, "__init__.py", '"""Words."""\n\n__version__ = "1"\n'),
]


@pytest.mark.parametrize(("rule", "path", "source"), SOUND)
def test_rule_lets_sound_code_be(rule, path, source):
    assert rule(path, source) == []


def test_a_chain_of_imports_is_followed():
    sources = {
        "__init__.py": "",
        "serve/__init__.py": "",
        "serve/request.py": "from dataclasses import dataclass",
        "serve/scheduler.py": "from gcompute.serve.request import Request",
        "serve/sampler.py": "import jax",
        "plan/memory.py": "def f():\n    import jax",
    }
    assert loads_jax_through(sources) == []
    through_module = {**sources, "serve/request.py": "from gcompute.serve import sampler"}
    assert any("serve/request.py -> serve/sampler.py -> jax" in chain for chain in loads_jax_through(through_module))
    through_package = {**sources, "serve/__init__.py": "try:\n    import flax\nexcept ImportError:\n    pass"}
    assert "serve/request.py -> serve/__init__.py -> flax" in loads_jax_through(through_package)
    for_checkers = {**sources, "serve/request.py": "if TYPE_CHECKING:\n    from gcompute.serve import sampler"}
    assert loads_jax_through(for_checkers) == []

"""gcompute explain: what a mesh does to every tensor of a model, without devices."""

import json
from pathlib import Path
from typing import Any

import click

from gcompute.cli.environment import quiet_backends
from gcompute.cli.flags import FILE, MODEL, MeshType, SectionedCommand
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.presets import model_config
from gcompute.config.train import MOST_ZERO, OPTIMIZERS, OptimizerConfig

MOST_PANELS = 24


class ExplainCommand(SectionedCommand):
    examples = (
        "gcompute explain demo --mesh fsdp=4,tensor=2",
        "gcompute explain llama3-70b --mesh data=4,fsdp=64,tensor=4 --optimizer adamw --json",
        "gcompute explain llama3-8b --mesh fsdp=8,tensor=2 --tensor attention --plot attention.png",
    )


@click.command(cls=ExplainCommand)
@click.argument("model", type=MODEL)
@click.option(
    "--mesh", type=MeshType(devices=False), default="", help="Mesh axes and sizes, as in fsdp=4,tensor=2.  [one device]"
)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="The state of this optimizer too.")
@click.option("--zero", type=click.IntRange(0, MOST_ZERO), default=0, help="As `gcompute train --zero`.  [0]")
@click.option("--tensor", "wanted", default="", help="Only tensors with this in their name.")
@click.option("--plot", type=FILE, help="Draw the parameters to this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    model: str, mesh: MeshShape, optimizer: str | None, zero: int, wanted: str, plot: Path | None, as_json: bool
) -> None:
    """Show the piece of every tensor of MODEL on a device: its shape, its bytes, over which axes it is copied.

    MODEL is a preset, or a path to a config.json or .toml. No device is used, so the mesh may be of any size.
    """
    config = model_config(model)
    if zero and not optimizer:
        raise ValueError(f"--zero {zero} splits the optimizer's state: add --optimizer, or leave it away.")
    quiet_backends()
    import jax

    from gcompute.model.transformer import abstract_params, param_dims
    from gcompute.parallel.explain import Explanation, explain, path_name
    from gcompute.parallel.mesh import abstract_mesh
    from gcompute.parallel.picture import plot_shardings
    from gcompute.parallel.rules import param_shardings, state_shardings, with_axis

    everywhere: Any = abstract_mesh(mesh)
    params, dims = abstract_params(config), param_dims(config)
    placed = param_shardings(dims, everywhere, mesh, abstract=params)
    trees: dict[str, tuple[Any, Any, Any]] = {"parameters": (params, placed, dims)}
    if optimizer:
        from gcompute.train.optimizer import make_optimizer

        state = jax.eval_shape(make_optimizer(OptimizerConfig(optimizer=optimizer), 1).init, params)
        split = with_axis(params, placed, Axis.DATA, mesh) if zero else placed
        trees["optimizer"] = (state, state_shardings(state, params, split, everywhere), None)
    parts = {name: explain(tree, where, dims=named) for name, (tree, where, named) in trees.items()}
    names = [row.path for part in parts.values() for row in part.placements]
    if not any(wanted in name for name in names):
        raise ValueError(f"--tensor {wanted!r} is in no name. Names: {', '.join(names)}.")
    parts = {
        name: Explanation(placements=tuple(row for row in part.placements if wanted in row.path))
        for name, part in parts.items()
    }
    if plot:
        flat = zip(jax.tree_util.tree_flatten_with_path(params)[0], *map(jax.tree.leaves, (placed, dims)), strict=True)
        panels = {path_name(path): (leaf, *rest) for (path, leaf), *rest in flat if wanted in path_name(path)}
        if not 0 < len(panels) <= MOST_PANELS:
            raise ValueError(f"--plot draws 1 to {MOST_PANELS} parameters, not {len(panels)}: choose by --tensor.")
        plot_shardings(panels, plot, title=f"{model} on {mesh}")
    if as_json:
        shown = {name: part.to_dict() for name, part in parts.items()}
        print(json.dumps({"model": model, "mesh": str(mesh), "num_devices": mesh.num_devices, **shown}))
        return
    for name, part in parts.items():
        print(f"{name} of {model} on {mesh}\n{part}\n")
    whole = Explanation(placements=tuple(row for part in parts.values() for row in part.placements))
    print(
        f"together: {whole.bytes_per_device / 2**20:,.2f} of {whole.total_bytes / 2**20:,.2f} MiB a device,"
        f" {whole.whole_bytes / 2**20:,.2f} MiB held whole by all"
    )
    if plot:
        print(f"drawn to {plot}")

"""ZeRO: data parallelism that does not keep n copies of everything, in per-device code and as shardings for `jit`.

Of P parameters, each device keeps 1 / n of what a stage splits (bytes as in mixed-precision Adam: 2 P of parameters,
2 P of gradients, 12 P of optimizer state):

  stage  splits                        bytes a device      bytes sent a step, times (n - 1) / n
  0      nothing                       16 P                2 |g|          all-reduce
  1      optimizer state               4 P + 12 P / n      |g| + |p|      reduce-scatter, all-gather
  2      ... and gradients             2 P + 14 P / n      A |g| + |p|    the same, A microbatches
  3      ... and parameters (FSDP)     16 P / n            A |g| + A |p|  once more A |p| to gather again going back

with |g| and |p| the bytes of all gradients and parameters. Where a loss uses whole parameters, a compiler may gather
them once for all microbatches (XLA on CPU does): then stage 3 sends A |g| + |p|. Each leaf is split along one dim
(`shard_specs`); one that has no such dim stays whole, and `replicated_leaves` names it.

Only an update that treats every element alone may run on shards. `zero_step` refuses an optimizer that mixes elements;
for clipping by the norm of all gradients use `zero_update.clip_by_global_norm`, which adds up over devices.
Under `automatic_zero_step` any optax optimizer is right as it is: there every array is whole, and XLA splits the work.

Stage 3 with one layer whole at a time: let the loss gather what it uses, under `jax.checkpoint` so that the backward
pass gathers again, and build the step with `loss_gathers=True`:

  def loss_fn(shards, batch):
      @jax.checkpoint
      def block(x, layer):
          return apply(gather(layer, layer_specs(specs["blocks"]), axis), x), None
      x, _ = jax.lax.scan(block, batch["x"], shards["blocks"])

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models", sections 5 and
7, figure 1; Zhao et al. 2023, "PyTorch FSDP: experiences on scaling fully sharded data parallel", section 3.
"""

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from gcompute.config.mesh import Axis
from gcompute.parallel.collectives import Axes, all_gather, all_reduce, reduce_scatter, varying
from gcompute.parallel.data import LossFn, Step, check_rows, grouped_gradients, local_gradients, num_shards, update
from gcompute.parallel.mesh import check_automatic
from gcompute.parallel.zero_layout import check_specs, check_stage, placements, split_dim
from gcompute.parallel.zero_update import check_elementwise


def shard(tree: PyTree, specs: PyTree, axis: Axes) -> PyTree:
    """Per-device code: this device's shards of whole leaves; what is not split stays whole."""
    place = jax.lax.axis_index(axis)
    size = jax.lax.axis_size(axis)

    def mine(leaf: Array, spec: PartitionSpec) -> Array:
        dim = split_dim(spec, axis)
        if dim is None:
            return leaf
        length = leaf.shape[dim] // size
        return jax.lax.dynamic_slice_in_dim(leaf, place * length, length, dim)

    return jax.tree.map(mine, tree, specs)


def gather(tree: PyTree, specs: PyTree, axis: Axes) -> PyTree:
    """Per-device code: whole leaves from shards, for use; its gradient is the reduce-scatter of the leaf's gradient.

    The gradient of a leaf that is not split is the sum over `axis`, under `check_vma=True` (as `varying`).
    """

    def whole(leaf: Array, spec: PartitionSpec) -> Array:
        dim = split_dim(spec, axis)
        return varying(leaf, axis) if dim is None else all_gather(leaf, axis, dim)

    return jax.tree.map(whole, tree, specs)


def zero_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    specs: PyTree,
    *,
    stage: int,
    axis: Axes = Axis.FSDP,
    replicas: tuple[str, ...] = (),
    accumulation: int = 1,
    loss_gathers: bool = False,
) -> Step:
    """A train step of ZeRO stage 1, 2 or 3 in per-device code, over what `place` gives; the contract of `data.py`.

    1: the sum of all microbatches' gradients is reduce-scattered, each device updates its shard, and the parameters
    are gathered. 2: every microbatch's gradient is reduce-scattered, so only shards are added up. 3: parameters are
    gathered for use, and stay shards.

    Args:
      specs: of `shard_specs`, for `axis`.
      replicas: axes that see other rows of the batch but hold the same shards (hybrid sharding); their gradients are
        all-reduced once.
      loss_gathers: for stage 3, `loss_fn` is given shards and calls `gather` itself.

    Raises:
      ValueError: the stage or an axis is unknown; (when traced) a spec does not fit, the batch does not divide, or the
        optimizer mixes elements.
    """
    _check_stage(stage, loss_gathers)
    everywhere = (*replicas, *((axis,) if isinstance(axis, str) else axis))
    size = num_shards(mesh, everywhere)
    rows_spec = PartitionSpec(everywhere)

    # XLA for TPU would move the reduce-scatters out of the loop over microbatches, and add up whole gradients in it.
    barrier = jax.lax.optimization_barrier

    def reduce_scattered(gradients: PyTree) -> PyTree:
        def share(leaf: Array, spec: PartitionSpec) -> Array:
            dim = split_dim(spec, axis)
            return leaf if dim is None else reduce_scatter(leaf, axis, dim)

        return barrier(jax.tree.map(share, gradients, specs))

    def gathering_loss(shards: PyTree, rows: PyTree) -> Array:
        return loss_fn(gather(shards, specs, axis), rows)

    def mean(gradient: Array, spec: PartitionSpec) -> Array:
        summed = everywhere if split_dim(spec, axis) is None else replicas
        return (all_reduce(gradient, summed) if summed else gradient) / size

    def invariant(leaf: Array, spec: PartitionSpec) -> Array:
        dim = split_dim(spec, axis)
        return leaf if dim is None else all_gather(leaf, axis, dim, invariant=True)

    def per_device(params: PyTree, opt_state: PyTree, rows: PyTree) -> tuple[PyTree, PyTree, Array]:
        used = varying(params, everywhere)
        common = {"accumulation": accumulation, "axes": everywhere}
        if stage == 1:
            loss, gradients = local_gradients(loss_fn, used, rows, **common)
            gradients = reduce_scattered(gradients)
        elif stage == 2:
            loss, gradients = local_gradients(loss_fn, used, rows, each=reduce_scattered, **common)
        else:
            use = loss_fn if loss_gathers else gathering_loss
            loss, gradients = local_gradients(use, used, rows, each=barrier, **common)
        gradients = jax.tree.map(mean, gradients, specs)
        mine = params if stage == 3 else shard(params, specs, axis)
        check_elementwise(optimizer, gradients, opt_state, mine)
        mine, opt_state = update(optimizer, mine, opt_state, gradients)
        params = mine if stage == 3 else jax.tree.map(invariant, mine, specs)
        return params, opt_state, all_reduce(loss, everywhere, "mean")

    def step(params: PyTree, opt_state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, Array]:
        check_rows(batch, size, accumulation)
        check_specs(params, specs, axis, mesh)
        at = jax.tree.map(lambda sharding: sharding.spec, placements(params, optimizer, mesh, specs, stage))
        in_specs, out_specs = (*at, rows_spec), (*at, PartitionSpec())
        return jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=out_specs)(params, opt_state, batch)

    return step


def automatic_zero_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    specs: PyTree,
    *,
    stage: int,
    axis: Axes = Axis.FSDP,
    replicas: tuple[str, ...] = (),
    accumulation: int = 1,
    loss_gathers: bool = False,
) -> Step:
    """`zero_step` in the notation of `jit`: the one-device program, with gradients and state pinned to shards.

    The compiler chooses the collectives: where it has no reduce-scatter (XLA on CPU) it makes an all-reduce, of which
    each device then takes its slice.

    Args:
      loss_gathers: for stage 3, parameters reach `loss_fn` as shards, and the compiler may split the work by them
        rather than gather them, as tensor parallelism does. Without it they are pinned whole for use.

    Raises:
      ValueError: as `zero_step`, but for the optimizer: any will do; or `mesh` has explicit axes.
    """
    _check_stage(stage, loss_gathers)
    check_automatic(mesh)
    everywhere = (*replicas, *((axis,) if isinstance(axis, str) else axis))
    size = num_shards(mesh, everywhere)
    rows = NamedSharding(mesh, PartitionSpec(everywhere))
    split = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    whole = NamedSharding(mesh, PartitionSpec())
    pin = jax.lax.with_sharding_constraint

    def step(params: PyTree, opt_state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree, Array]:
        check_rows(batch, size, accumulation)
        check_specs(params, specs, axis, mesh)
        params_at, state_at = placements(params, optimizer, mesh, specs, stage)
        params, opt_state, batch = pin(params, params_at), pin(opt_state, state_at), pin(batch, rows)
        if stage == 1 and accumulation > 1:
            loss, gradients = grouped_gradients(loss_fn, params, batch, size, rows, accumulation)
        else:
            used = loss_fn if loss_gathers or stage < 3 else lambda shards, rows: loss_fn(pin(shards, whole), rows)
            loss, gradients = local_gradients(used, params, batch, accumulation, each=lambda tree: pin(tree, split))
        params, opt_state = update(optimizer, pin(params, split), opt_state, pin(gradients, split))
        return pin(params, params_at), pin(opt_state, state_at), pin(loss, whole)

    return step


def _check_stage(stage: int, loss_gathers: bool) -> None:
    check_stage(stage, least=1)
    if loss_gathers and stage != 3:
        raise ValueError(f"loss_gathers is for stage 3, whose parameters are shards: with stage={stage} leave it out.")

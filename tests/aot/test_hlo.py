"""The reader of compiled programs: tiny programs whose collectives are known, and texts that a TPU compiler wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gcompute.aot.hlo import (
    Collective,
    UnreadableProgram,
    collective_bytes_by_axis,
    count_collectives,
    read_collectives,
)
from gcompute.aot.program_text import parse_programs
from gcompute.config.mesh import Axis

P = PartitionSpec
RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 4), (Axis.DATA, Axis.TENSOR), axis_types=(AxisType.Auto,) * 2)


def read(f, mesh: Mesh, in_spec: P, out_spec: P) -> list[Collective]:
    """The collectives of `f` on a float32 [16, 8] array."""
    program = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=NamedSharding(mesh, in_spec))
    return read_collectives(program.lower(x).compile(), mesh)


# (function, in_spec, out_spec, kind, axes, operand and result bytes of a device, bytes sent)
ONE = {
    "psum": (
        *(lambda x: jax.lax.psum(x, Axis.TENSOR), P(Axis.DATA, Axis.TENSOR), P(Axis.DATA)),
        *("all-reduce", ("tensor",), 64, 64, 2 * 3 / 4 * 64),
    ),
    "psum over both": (
        *(lambda x: jax.lax.psum(x, (Axis.DATA, Axis.TENSOR)), P(Axis.DATA, Axis.TENSOR), P()),
        *("all-reduce", ("data", "tensor"), 64, 64, 2 * 7 / 8 * 64),
    ),
    "all_gather": (
        *(lambda x: jax.lax.all_gather(x, Axis.TENSOR, tiled=True), P(Axis.TENSOR), P()),
        *("all-gather", ("tensor",), 128, 512, 3 / 4 * 512),
    ),
    "psum_scatter": (
        *(lambda x: jax.lax.psum_scatter(x, Axis.DATA, tiled=True), P(), P(Axis.DATA)),
        *("reduce-scatter", ("data",), 512, 256, 1 / 2 * 512),
    ),
    "all_to_all": (
        *(lambda x: jax.lax.all_to_all(x, Axis.TENSOR, 1, 0, tiled=True), P(Axis.TENSOR), P(None, Axis.TENSOR)),
        *("all-to-all", ("tensor",), 128, 128, 3 / 4 * 128),
    ),
    "ppermute": (
        *(lambda x: jax.lax.ppermute(x, Axis.TENSOR, RING), P(Axis.TENSOR), P(Axis.TENSOR)),
        *("collective-permute", ("tensor",), 128, 128, 128),
    ),
}


@pytest.mark.oldest
@pytest.mark.parametrize("name", ONE)
def test_one_collective(name: str, mesh: Mesh):
    f, in_spec, out_spec, kind, axes, operand, result, sent = ONE[name]
    (found,) = read(f, mesh, in_spec, out_spec)
    assert (found.kind, found.axes, found.dtype) == (kind, axes, "f32")
    assert (found.operand_bytes, found.result_bytes, found.sent_bytes) == (operand, result, sent)
    assert found.loops == ()
    assert found.trips == 1
    if kind == "collective-permute":
        assert found.pairs == tuple((s + row, t + row) for row in (0, 4) for s, t in RING)
    else:
        assert sorted(number for group in found.groups for number in group) == list(range(8))


def test_none(mesh: Mesh):
    assert read(lambda x: 2 * x, mesh, P(Axis.DATA), P(Axis.DATA)) == []


def test_half_an_axis_is_no_axis(mesh: Mesh):
    f = lambda x: jax.lax.psum(x, Axis.TENSOR, axis_index_groups=[[0, 1], [2, 3]])  # noqa: E731
    (found,) = read(f, mesh, P(Axis.TENSOR), P(Axis.TENSOR))
    assert found.axes is None
    assert found.group_size == 2


@pytest.mark.oldest
def test_loops_multiply(mesh: Mesh):
    def inner(x, _):
        return jax.lax.ppermute(x, Axis.TENSOR, RING), None

    def outer(x, _):
        x = jax.lax.scan(inner, x, None, length=3)[0]
        return x * jax.lax.psum(x.sum(), Axis.DATA), None

    found = read(lambda x: jax.lax.scan(outer, x, None, length=5)[0], mesh, P(Axis.TENSOR), P(Axis.TENSOR))
    assert {one.kind: one.loops for one in found} == {"collective-permute": (5, 3), "all-reduce": (5,)}
    assert {one.kind: one.trips for one in found} == {"collective-permute": 15, "all-reduce": 5}
    assert collective_bytes_by_axis(found) == {
        ("tensor",): {"collective-permute": 15 * 128.0},
        ("data",): {"all-reduce": 5 * 4.0},
    }


def test_a_count_that_is_data_is_unknown(mesh: Mesh):
    def f(x):
        count = x[0, 0].astype(jnp.int32)
        return jax.lax.fori_loop(0, count, lambda i, y: jax.lax.psum(y, Axis.TENSOR), x)

    (found,) = read(f, mesh, P(Axis.DATA), P(Axis.DATA))
    assert found.loops == (None,)
    assert found.trips is None
    assert found.known_trips == 1


def test_automatic_sharding_is_read_too(mesh: Mesh):
    """Every group notation that this JAX writes, with devices in another order than their ids."""
    turned = Mesh(mesh.devices[:, ::-1], mesh.axis_names, axis_types=mesh.axis_types)
    split, whole = NamedSharding(turned, P(Axis.TENSOR)), NamedSharding(turned, P())
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=split)
    found = read_collectives(jax.jit(lambda x: x + 1, out_shardings=whole).lower(x).compile(), turned)
    assert [(one.kind, one.axes, one.result_bytes) for one in found] == [("all-gather", ("tensor",), 256)]


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="not the text of a compiled program"):
        count_collectives("module @jit_f { }")


def test_unreadable_program_says_so():
    class Failing:
        def as_text(self):
            raise RuntimeError("INTERNAL: RET_CHECK failure async-update\nmore")

        def runtime_executable(self):
            raise RuntimeError("nor this")

    with pytest.raises(UnreadableProgram, match=r"^unreadable: INTERNAL: RET_CHECK failure async-update$"):
        count_collectives(Failing())


# What libtpu 0.0.52 wrote, shortened. An FSDP loop: the gather of the backward pass starts in one fusion, advances in
# another beside a matmul and ends in a third; the reduction is fused with the slice that is kept; the loop has no noted
# count; a kernel's metadata spans lines.
TPU = """HloModule jit_mlp, is_scheduled=true, entry_computation_layout={(bf16[1,128,1024]{2,1,0})->f32[]}, \
num_partitions=8, frontend_attributes={arg_layout_modes="default"}

FileNames
1 "step.py"

%fused_computation.22 (param_0.74: bf16[1,128,1024]) -> (bf16[1,128,1024], bf16[1,1024,1024], s32[2], u32[]) {
  %param_0.74 = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.19 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.74), channel_id=9, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}, use_global_device_ids=true, \
backend_config={"flag_configs":[],"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %custom-call.4 = (bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)}, bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)}, \
s32[2]{0:S(4)}, u32[]{:S(2)}) custom-call(%all-gather.19), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.29 (param_0.79: bf16[1,128,1024]) -> bf16[1,1024,1024] {
  %param_0.79 = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  ROOT %all-gather.21 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%param_0.79), channel_id=9, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}, use_global_device_ids=true, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
}

%fused_computation.24 (param_0.82: bf16[1,128,1024]) -> bf16[1,1024,1024] {
  %param_0.82 = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.23 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)} all-gather(%param_0.82), channel_id=9, \
replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={1}, use_global_device_ids=true, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  ROOT %custom-call.6 = bf16[1,1024,1024]{2,1,0:T(8,128)(2,1)S(1)} custom-call(%param_0.82, %all-gather.23), \
custom_call_target="AsyncCollectiveDone"
}

%add.1 (x.5: bf16[], y.3: bf16[]) -> bf16[] {
  %x.5 = bf16[]{:T(256)} parameter(0)
  %y.3 = bf16[]{:T(256)} parameter(1)
  ROOT %add.2 = bf16[]{:T(256)} add(%x.5, %y.3)
}

%all-reduce-scatter.clone.1 (input.2: bf16[1024,1024]) -> bf16[128,1024] {
  %input.2 = bf16[1024,1024]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %zero = s32[]{:T(128)} constant(0)
  %all-reduce.5 = bf16[1024,1024]{1,0:T(8,128)(2,1)} all-reduce(%input.2), channel_id=6, \
replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true, to_apply=%add.1
  ROOT %dynamic-slice.33 = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, %zero, %zero), \
dynamic_slice_sizes={128,1024}
}

%async_computation.1 (param_0.91: bf16[4,8]) -> bf16[4,8] {
  %param_0.91 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-to-all.3 = bf16[4,8]{1,0:T(8,128)(2,1)} all-to-all(%param_0.91), channel_id=3, \
replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%body (wide.param.5: (s32[], bf16[1,128,1024], bf16[4,8], s32[])) -> (s32[], bf16[1,128,1024], bf16[4,8], s32[]) {
  %wide.param.5 = (s32[]{:T(128)}, bf16[1,128,1024]{2,1,0:T(8,128)(2,1)}, bf16[4,8]{1,0:T(8,128)(2,1)}, \
/*index=3*/s32[]{:T(128)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=0
  %copy.9 = s32[]{:T(128)S(6)} copy(%get-tuple-element.1)
  %get-tuple-element.2 = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.5), index=1
  %get-tuple-element.3 = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.5), index=2
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%wide.param.5), index=3
  %async-collective-start = (bf16[1,128,1024]{2,1,0}, bf16[1,1024,1024]{2,1,0}, s32[2]{0:S(4)}, u32[]{:S(2)}) \
fusion(%get-tuple-element.2), kind=kCustom, output_to_operand_aliasing={{0}: (0, {})}, calls=%fused_computation.22
  %kernel = bf16[1024,1024]{1,0} custom-call(%get-tuple-element.2), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"block_kv\\": 512}"
}}, metadata={op_name="jit(mlp)/kernel"}
  %fusion.29 = bf16[1,1024,1024]{2,1,0} fusion(%get-tuple-element.2), kind=kOutput, calls=%async_collective_fusion.29
  %async-collective-done = bf16[1,1024,1024]{2,1,0} fusion(%get-tuple-element.2), kind=kCustom, \
calls=%fused_computation.24
  %fusion.27 = bf16[128,1024]{1,0:T(8,128)(2,1)S(1)} fusion(%kernel), kind=kCustom, calls=%all-reduce-scatter.clone.1
  %all-to-all-start = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}, u32[]) async-start(%get-tuple-element.3), \
calls=%async_computation.1
  %all-to-all-update = ((bf16[4,8]{1,0}), bf16[4,8]{1,0}, u32[]) async-update(%all-to-all-start), \
calls=%async_computation.1
  %all-to-all-done = bf16[4,8]{1,0} async-done(%all-to-all-update), calls=%async_computation.1
  %add.26 = s32[]{:T(128)} add(%copy.9, %get-tuple-element.4)
  ROOT %tuple.57 = (s32[]{:T(128)}, bf16[1,128,1024]{2,1,0}, bf16[4,8]{1,0}, s32[]{:T(128)}) tuple(%add.26, \
%get-tuple-element.2, %all-to-all-done, %get-tuple-element.4)
}

%condition (wide.param.1: (s32[], bf16[1,128,1024], bf16[4,8], s32[])) -> pred[] {
  %wide.param.1 = (s32[]{:T(128)}, bf16[1,128,1024]{2,1,0}, bf16[4,8]{1,0}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.220 = s32[]{:T(128)} get-tuple-element(%wide.param.1), index=0
  %constant.56 = s32[]{:T(128)} constant(12)
  ROOT %lt.10 = pred[]{:T(512)} compare(%get-tuple-element.220, %constant.56), direction=LT
}, execution_thread="main"

ENTRY %main.6_spmd (param.5: bf16[1,128,1024], param.4: bf16[4,8]) -> bf16[4,8] {
  %param.5 = bf16[1,128,1024]{2,1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="ws"}
  %param.4 = bf16[4,8]{1,0:T(8,128)(2,1)} parameter(1)
  %constant.61 = s32[]{:T(128)} constant(2)
  %copy.32 = s32[]{:T(128)} copy(%constant.61)
  %tuple.60 = (s32[]{:T(128)}, bf16[1,128,1024]{2,1,0}, bf16[4,8]{1,0}, s32[]{:T(128)}) tuple(%copy.32, %param.5, \
%param.4, /*index=3*/%constant.61)
  %while.32 = (s32[]{:T(128)}, bf16[1,128,1024]{2,1,0}, bf16[4,8]{1,0}, s32[]{:T(128)}) while(%tuple.60), \
condition=%condition, body=%body, metadata={op_name="jit(mlp)/while"}
  %get-tuple-element.9 = bf16[4,8]{1,0} get-tuple-element(%while.32), index=2
  %collective-permute-start = (bf16[4,8]{1,0}, bf16[4,8]{1,0:S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%get-tuple-element.9), channel_id=1, source_target_pairs={{0,4},{4,0}}
  ROOT %collective-permute-done = bf16[4,8]{1,0} collective-permute-done(%collective-permute-start)
}
"""


def test_tpu_text(mesh: Mesh):
    found = {one.kind: one for one in read_collectives(TPU, mesh)}
    assert count_collectives(TPU) == {"all-gather": 1, "reduce-scatter": 1, "all-to-all": 1, "collective-permute": 1}
    gather, scatter = found["all-gather"], found["reduce-scatter"]
    # From 2 up to 12 in steps of 2, all three of them found in different places.
    assert gather.loops == scatter.loops == found["all-to-all"].loops == (5,)
    assert (gather.operand_bytes, gather.result_bytes) == (2**18, 2**21)
    assert (scatter.operand_bytes, scatter.result_bytes) == (2**21, 2**18)
    assert gather.sent_bytes == scatter.sent_bytes == 7 / 8 * 2**21
    assert gather.axes == scatter.axes == ("data", "tensor")
    assert found["all-to-all"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert found["all-to-all"].axes is None
    assert (found["collective-permute"].loops, found["collective-permute"].axes) == ((), ("data",))


def test_kernel_metadata_does_not_end_a_computation():
    (program,) = parse_programs(TPU)
    assert len(program.computations["body"].instructions) == 16
    assert program.computations["body"].root == "tuple.57"


# A program for two slices of four chips is that of one slice: the data centre's network is reached through the host.
SLICES = """HloModule jit_f, num_partitions=4

ENTRY %main (param.1: bf16[256,8]) -> bf16[512,8] {
  %param.1 = bf16[256,8]{1,0} parameter(0)
  %after-all = token[] after-all()
  %send = (bf16[256,8]{1,0}, u32[], token[]) send(%param.1, %after-all), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all_gather.3_0",_xla_megascale_transfer_type="ALL_GATHER"}
  %recv = (bf16[512,8]{1,0}, u32[], token[]) recv(%after-all), channel_id=1, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_rendezvous="all_gather.3_0",_xla_megascale_transfer_type="ALL_GATHER"}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = (bf16[512,8]{1,0}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  %result = bf16[512,8]{1,0} get-tuple-element(%recv-done), index=0
  ROOT %all-reduce = bf16[512,8]{1,0} all-reduce(%result), channel_id=3, replica_groups={{0,1,2,3}}, to_apply=%none
}
"""


class Chip:
    """What of a TPU device the reader looks at."""

    platform = "tpu"

    def __init__(self, number: int):
        self.slice_index, self.id = number // 4, 100_000 * (number // 4 + 1) + number % 4


@pytest.mark.parametrize("listed", [True, False])
def test_between_slices(listed: bool):
    mesh = Mesh(np.array([Chip(number) for number in range(8)]).reshape(2, 4), (Axis.DATA, Axis.TENSOR))
    transfers = {"all_gather.3_0": tuple((100_000 + i, 200_000 + i) for i in range(4))} if listed else None
    gather, reduce = read_collectives(SLICES, mesh, transfers=transfers)
    assert (gather.kind, gather.axes, gather.between_slices, gather.group_size) == ("all-gather", ("data",), True, 2)
    assert (gather.operand_bytes, gather.result_bytes, gather.sent_bytes) == (4096, 8192, 4096)
    assert gather.groups == (((0, 4), (1, 5), (2, 6), (3, 7)) if listed else ())
    assert (reduce.kind, reduce.axes, reduce.between_slices) == ("all-reduce", ("tensor",), False)

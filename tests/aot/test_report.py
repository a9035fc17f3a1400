"""Reports on programs for fake CPU devices, and the readers of what the TPU compiler writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gcompute.aot.compiler import (
    Buffer,
    CompilerError,
    compile_lowered,
    parse_largest,
    parse_too_large,
    parse_transfers,
)
from gcompute.aot.report import compile_report
from gcompute.config.mesh import Axis
from gcompute.hardware.target import Target

P = PartitionSpec


@pytest.mark.oldest
def test_an_update_on_eight_devices():
    mesh = Mesh(np.array(jax.devices()), (Axis.FSDP,), axis_types=(AxisType.Auto,))
    split, whole = NamedSharding(mesh, P(Axis.FSDP)), NamedSharding(mesh, P())
    w = jax.ShapeDtypeStruct((4096, 8), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=whole)

    def update(w, x):
        return w - x, (w @ x).sum()

    lowered = jax.jit(update, donate_argnums=0, out_shardings=(split, whole)).lower(w, x)
    report, text = compile_report(lowered, Target.parse("cpu:8"), mesh=mesh)
    assert report.fits
    assert report.limit_bytes is None
    assert report.unreadable is None
    shard = 4096 * 8 * 4 // 8
    assert report.memory.arguments_bytes == shard + 32
    assert report.memory.aliased_bytes == shard
    assert report.memory.outputs_bytes >= shard + 4
    assert report.needed_bytes == report.memory.total_bytes < 2 * shard + report.memory.temporaries_bytes
    (one,) = report.collectives
    assert (one.kind, one.axes, one.num_instructions, one.runs) == ("all-reduce", ("fsdp",), 1, 1)
    assert one.sent_bytes == 2 * 7 / 8 * 4
    assert text is not None
    assert text.startswith("HloModule")
    assert json.loads(json.dumps(report.to_dict()))["collectives"][0]["axes"] == ["fsdp"]


LATE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. \
Used 63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G."""
EARLY = """RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO \
temporaries (1.00T) exceeds available HBM (15.75G). HLO module: jit_step."""


def test_too_large_in_both_wordings():
    assert parse_too_large(EARLY) == (2**40, int(15.75 * 2**30))
    assert parse_too_large(LATE) == (int(63.80 * 2**30), int(30.75 * 2**30))
    assert parse_too_large("INTERNAL: something else") is None


def failing(message: str):
    class Lowered:
        def compile(self, compiler_options):
            raise jax.errors.JaxRuntimeError(message)

    return Lowered()


def test_too_large_is_a_report():
    done = compile_lowered(failing(EARLY), "tpu")  # type: ignore[arg-type]
    assert not done.fits
    assert done.memory.total_bytes == 2**40
    assert done.available_bytes == int(15.75 * 2**30)
    assert done.unreadable is not None


def test_other_failures_are_errors():
    with pytest.raises(CompilerError, match="INTERNAL: something else"):
        compile_lowered(failing("INTERNAL: something else"), "tpu")  # type: ignore[arg-type]


USAGE = """Memory Space: default (color=0)
Total bytes: 15200332800 (14.16GiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
  ------------------------------------------------------------
    6.75GiB( 61%);    2.25GiB;   4831903744;                5; 5×bf16[8,6144,24576]
   11.25GiB( 61%);    4.50GiB;        65536;                6; bf16[8,64], 5×f32[8,64], (u32[], pred[2]), f32[], s32[]
   11.06GiB(100%);       512B;  10318102528;                1; f32[]

Memory Space: vmem (color=1)
Total bytes: 100663296 (96.00MiB)
  cumulative_size;       size;       offset; used_by_n_values; shapes_list
   99.00GiB(100%);   99.00GiB;            0;                1; bf16[1024,24576]
"""


@pytest.mark.oldest
def test_largest_buffers():
    assert parse_largest(USAGE) == (
        Buffer(size_bytes=int(4.5 * 2**30), arrays="bf16[8,64], 5×f32[8,64], (u32[], pred[2]) and 2 more"),
        Buffer(size_bytes=int(2.25 * 2**30), arrays="5×bf16[8,6144,24576]"),
        Buffer(size_bytes=512, arrays="f32[]"),
    )
    assert parse_largest("") == ()


TRANSFERS = """host_transfers {
  channel: 2
  key: "psum.7_0"
  megascale_info {
    transfer_type: ALL_REDUCE
    endpoint_groups {
      endpoints: 100000
      endpoints: 300000
    }
    endpoint_groups {
      endpoints: 100001
      endpoints: 300001
    }
  }
}
host_transfers {
  channel: 1
  key: "psum.7_0"
}
host_transfers {
  channel: 4
  key: "ppermute.3_0"
  megascale_info {
    transfer_type: ONE_TO_ONE
    one_to_all_groups {
      source: 100000
      destinations: 200000
    }
  }
}
"""


@pytest.mark.oldest
def test_transfers_between_slices():
    assert parse_transfers(TRANSFERS) == {
        "psum.7_0": ((100000, 300000), (100001, 300001)),
        "ppermute.3_0": ((100000, 200000),),
    }

"""The trainer's own step on meshes of one axis and of two, and what the textbook has its parts send.

The layers run in a scan, as on accelerators: without one XLA:CPU keeps for the backward pass what the forward gathered.
Everything is float32, so that every size is 4 bytes a number.
"""

import dataclasses
import math
from functools import partial

import jax
import textbook
from account import Axes, Program, Reason, scattered_whole
from explicit import FLOAT, LOCKSTEP
from jax.sharding import Mesh

from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.presets import model_config
from gcompute.config.train import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from gcompute.model.transformer import abstract_params, param_dims
from gcompute.parallel.collectives import HAS_PCAST
from gcompute.parallel.rules import RULES
from gcompute.train.programs import lower_train

BATCH = 16
SIZES = {"vocab": 4096, "dim": 1024, "heads": 8, "kv_heads": 8, "ffn": 4096, "context": 256}
MODEL = dataclasses.replace(model_config("test"), **SIZES, layers=4)
MIXTURE = dataclasses.replace(model_config("test-moe"), **SIZES)
MICROBATCHES = 8

APART = (
    "the gradients of x through q, k and v, and through gate and up, are reduced one by one; the TPU compiler adds"
    " them up first"
)
ENDS = "each of the two uses of a tied embedding reduces its part of the gradient; the TPU compiler adds them up first"
LOOK_UP = "tokens are looked up by columns of the embedding, so B T D numbers go to and fro, and V D do not"
HEAD_ONCE = "the output layer's matrix is gathered once for both passes"
EVERY_STAGE = "all stages add up the gradients of both ends, though two of them have parts of it"
ZERO_1 = "the trainer's first stage reduces the gradient whole; its second scatters it"
ROUTER = "the router lies with the experts, and is gathered and its gradient reduced whole"
CONSTANT = "JAX 0.7 sends the gradient of the mean over tokens, a constant that later compilers fold"
SCALARS = "loss, norms of gradients, and what routers count"


def programs() -> list[Program]:
    """The train step on each mesh."""
    return [
        _program("data=8"),
        _program("data=8", zero=1),
        _program("data=8", zero=2),
        _program("fsdp=8"),
        _program("tensor=4"),
        _program("context=4"),
        _program("expert=4", MIXTURE),
        _program("stage=4"),
        _program("data=2,fsdp=4"),
        _program("data=2,tensor=4"),
        _program("data=2,context=4"),
        _program("data=2,stage=4"),
        _program("fsdp=2,tensor=4"),
    ]


def _program(mesh: str, model: ModelConfig = MODEL, zero: int = 0) -> Program:
    shape = MeshShape.parse(mesh)
    train = TrainConfig(
        batch=BATCH,
        mesh=shape,
        zero=zero,
        accumulation=MICROBATCHES if shape.stage > 1 else 1,
        precision="float32",
        unroll=1,
    )
    run = RunConfig(model=model, optimizer=OptimizerConfig(), train=train, data=DataConfig())
    ledger = _Ledger(run, shape)
    ledger.parameters()
    ledger.activations()
    return Program(
        name=f"train{f', ZeRO-{zero}' if zero else ''}",
        mesh=shape,
        lower=partial(_lower, run),
        textbook=ledger.textbook,
        reasons=tuple(ledger.reasons),
        scalars=ledger.scalars(),
    )


def _lower(run: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    return lower_train(run, mesh, mesh.devices.flat[0].platform).lowered


class _Ledger:
    """What a run is to send: the textbook's sums, by axes and kind, and the reasons for the rest."""

    def __init__(self, run: RunConfig, mesh: MeshShape):
        self.run, self.mesh, self.model = run, mesh, run.model
        self.textbook: dict[Axes, textbook.Bytes] = {}
        self.reasons: list[Reason] = []
        # Rows and tokens of a sequence that one device has, and its activations between blocks, were tensor 1.
        self.rows = BATCH // mesh.batch_shards
        self.tokens = self.rows * run.seq // mesh.context
        self.activation = FLOAT * self.tokens * self.model.dim
        dims = jax.tree.leaves(param_dims(self.model))
        shapes = [leaf.shape for leaf in jax.tree.leaves(abstract_params(self.model))]
        self.leaves = list(zip(dims, shapes, strict=True))

    def expect(self, axis: Axis, sends: textbook.Bytes, times: float = 1) -> None:
        axes: Axes = (axis.value,)
        self.textbook[axes] = textbook.total(self.textbook.get(axes, {}), textbook.total(sends, times=times))

    def because(self, why: str, axis: Axis, kind: str, size: float, backend: str | None = None) -> None:
        reason = Reason(axes=(axis.value,), kind=kind, sent_bytes=size, why=why, backend=backend)
        self.reasons.append(reason)

    def on_cpu(self, axis: Axis, size: float) -> None:
        """A sum that the compiler was to scatter."""
        self.reasons += scattered_whole((axis.value,), size, self.mesh.size(axis))

    def scalars(self) -> dict[Axes, tuple[int, str]]:
        # The norm of each gradient, for clipping and for the metrics.
        most = 2 * len(self.leaves) + 4 + 3 * self.model.layers
        return {(axis.value,): (most, SCALARS) for axis in Axis if self.mesh.size(axis) > 1}

    def parameters(self) -> None:
        """Gradients reduced, and parameters gathered for use."""
        for dims, shape in self.leaves:
            axes = {axis for dim in dims for axis in RULES.get(dim, ()) if self.mesh.size(axis) > 1}
            local = FLOAT * math.prod(shape) / math.prod(self.mesh.size(axis) for axis in axes)
            if Axis.DATA not in axes and self.mesh.data > 1:
                self._over_data(local)
            if Axis.FSDP in axes:
                self._over_fsdp(dims, local * self.mesh.fsdp)
            if self.mesh.context > 1:
                self._reduced(Axis.CONTEXT, dims, local)
            if self.mesh.expert > 1 and dims.endswith("DE"):
                self._router(local * self.mesh.expert)
            elif self.mesh.expert > 1 and Axis.EXPERT not in axes:
                self._reduced(Axis.EXPERT, dims, local)
            if self.mesh.tensor > 1 and Axis.TENSOR not in axes:
                # Of a norm's scale each device sees other tokens; the sum over them comes before that over fsdp.
                whole = local * (self.mesh.fsdp if Axis.FSDP in axes else 1)
                self.expect(Axis.TENSOR, textbook.data_parallel(whole, self.mesh.tensor))
            if self.mesh.stage > 1 and Axis.STAGE not in axes:
                self._over_stages(dims, local)

    def _over_data(self, local: float) -> None:
        n, zero = self.mesh.data, self.run.train.zero
        self.expect(Axis.DATA, textbook.zero(zero, local, n) if zero else textbook.data_parallel(local, n))
        if zero == 1:
            self.because(ZERO_1, Axis.DATA, textbook.REDUCE_SCATTER, -textbook.gathered(local, n))
            self.because(ZERO_1, Axis.DATA, textbook.ALL_REDUCE, textbook.reduced(local, n))

    def _over_fsdp(self, dims: str, whole: float) -> None:
        n = self.mesh.fsdp
        self.expect(Axis.FSDP, textbook.zero(3, whole, n))
        if dims == "VD":
            self.because(HEAD_ONCE, Axis.FSDP, textbook.ALL_GATHER, -textbook.gathered(whole, n))
        else:
            self.on_cpu(Axis.FSDP, whole)

    def _reduced(self, axis: Axis, dims: str, local: float) -> None:
        n = self.mesh.size(axis)
        self.expect(axis, textbook.data_parallel(local, n))
        if dims == "VD":
            self.because(ENDS, axis, textbook.ALL_REDUCE, textbook.reduced(local, n), "cpu")

    def _router(self, whole: float) -> None:
        n = self.mesh.expert
        self.because(ROUTER, Axis.EXPERT, textbook.ALL_GATHER, textbook.gathered(whole, n))
        self.because(ROUTER, Axis.EXPERT, textbook.ALL_REDUCE, textbook.reduced(whole, n))

    def _over_stages(self, dims: str, local: float) -> None:
        n, pair = self.mesh.stage, 2
        if dims == "VD":
            # Of a tied embedding the first stage and the last have a part. Source: Narayanan et al. 2021, section 3.2.
            self.expect(Axis.STAGE, textbook.data_parallel(local, pair))
            local_pair = textbook.reduced(local, pair)
        else:
            local_pair = 0.0
        self.because(EVERY_STAGE, Axis.STAGE, textbook.ALL_REDUCE, textbook.reduced(local, n) - local_pair)

    def activations(self) -> None:
        """What layers and the two ends send."""
        mesh, model, seq = self.mesh, self.model, self.run.seq
        if mesh.tensor > 1:
            self._over_tensor()
        if mesh.context > 1:
            heads = model.num_kv_heads // mesh.tensor * model.head_size
            kv = 2 * FLOAT * self.rows * seq * heads
            self.expect(Axis.CONTEXT, textbook.ring_attention(kv, mesh.context), times=model.layers)
        if mesh.expert > 1:
            buffers = FLOAT * self.rows * model.num_experts * model.capacity(seq) * model.dim
            self.expect(Axis.EXPERT, textbook.experts(buffers, mesh.expert), times=model.layers)
        if mesh.fsdp > 1:
            self._look_up()
        if mesh.stage > 1:
            microbatches = self.run.train.accumulation or 1
            each = self.activation / microbatches
            self.expect(Axis.STAGE, textbook.pipeline(each, microbatches))
            self.because(LOCKSTEP, Axis.STAGE, textbook.PERMUTE, 2 * (mesh.stage - 1) * each)

    def _over_tensor(self) -> None:
        n, layers = self.mesh.tensor, self.model.layers
        block = textbook.sequence_block(self.activation, n, gathers_again=False)
        # Attention and MLP of each layer; a look-up that scatters; an output layer that gathers; the loss.
        self.expect(Axis.TENSOR, block, times=2 * layers)
        self.expect(Axis.TENSOR, textbook.vocab_embedding(self.activation, n, scatters=True))
        self.expect(Axis.TENSOR, textbook.vocab_embedding(self.activation, n, scatters=True))
        self.expect(Axis.TENSOR, textbook.vocab_cross_entropy(self.tokens, n))
        self.on_cpu(Axis.TENSOR, (4 * layers + 1) * self.activation)
        apart = 3 * layers * textbook.reduced(self.activation, n)
        self.because(APART, Axis.TENSOR, textbook.ALL_REDUCE, apart, "cpu")
        if self.mesh.data > 1 and jax.__version_info__ < HAS_PCAST:
            self.because(CONSTANT, Axis.TENSOR, textbook.ALL_REDUCE, textbook.reduced(FLOAT * self.tokens, n))

    def _look_up(self) -> None:
        n = self.mesh.fsdp
        rows = 2 * textbook.gathered(self.activation / self.mesh.tensor, n)
        self.because(LOOK_UP, Axis.FSDP, textbook.ALL_TO_ALL, rows)
        self.because(LOOK_UP, Axis.FSDP, textbook.ALL_GATHER, textbook.gathered(FLOAT * self.tokens * n, n))

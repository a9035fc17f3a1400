"""Predict the memory of a train step, component by component.

These are predictions from formulae, not measurements: a compiler fuses, reorders and reuses buffers, and its own
total is the judge of them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from gcompute.config.fields import nearest
from gcompute.config.mesh import MeshShape
from gcompute.config.model import ModelConfig
from gcompute.config.train import OPTIMIZERS, PRECISIONS, REMAT_POLICIES
from gcompute.plan.legal import check_mesh
from gcompute.plan.params import WeightArray, weight_arrays

FLOAT32_BYTES = 4
OPERAND_BYTES = {"float32": 4, "bfloat16": 2}
ADAFACTOR_SMALLEST_DIM = 128
# Arrays of D that differentiating a norm keeps: its input (centred), the normalised input, and the scaled result.
NORM_KEEPS = 3
MASK_BYTES = 5
# Of the arrays that a block's gradient works with, what XLA:GPU has at once, fitted to its totals (jax 0.10.2).
FUSED_WORKSPACE = 0.65
# Several times what keeps a matmul busy, and little beside a model whose vocabulary makes it matter.
LOGITS_BYTES = 2**29
# Blocks of 64 queries were the fastest of 32, 64 and 128 at T = 256, H = 64, with AVX2 and with AVX-512.
LEAST_QUERIES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainMemory:
    """Predicted bytes on the fullest device, by component.

    The last block's backward pass (`workspace_bytes`) starts when the logits are gone: `total_bytes` holds the larger
    of the two.
    """

    parameters_bytes: int
    gradients_bytes: int
    accumulator_bytes: int
    optimizer_bytes: int
    compute_copies_bytes: int
    activations_bytes: int
    workspace_bytes: int
    logits_bytes: int

    @property
    def total_bytes(self) -> int:
        return sum(dataclasses.astuple(self)) - min(self.workspace_bytes, self.logits_bytes)

    def to_dict(self) -> dict[str, int]:
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes}


def check_known(kind: str, value: str, legal: Sequence[str]) -> None:
    """Raise ValueError where `value` is not one of `legal`."""
    if value not in legal:
        raise ValueError(f"{kind}={value!r} is not known. {nearest(value, legal)}")


def train_memory(
    config: ModelConfig,
    *,
    batch: int,
    seq: int,
    accumulation: int = 1,
    optimizer: str = "adamw",
    precision: str = "bfloat16",
    remat: str = "none",
    mesh: MeshShape | None = None,
    residual: str = "float32",
    query_blocks: int = 1,
    fuses_mask: bool = False,
) -> TrainMemory:
    """Predict the bytes that one train step needs on the fullest device. A prediction from formulae.

    With P parameters on the device (see `array_shards`), p bytes an operand (2 in bfloat16) and
    t = batch seq / (accumulation data fsdp expert context) tokens of one microbatch on the device:

    - parameters, gradients: 4 P each; the accumulator 4 P more where accumulation > 1.
    - optimizer: `optimizer_state_values` values of 4 bytes.
    - compute copies: p P of the matrices where p = 2, and with fsdp > 1 the largest gathered block (or output layer).
    - activations: t L / stage times `kept_bytes_per_token`, for min(stage, accumulation) microbatches in flight; once
      t 12 D for the final norm and t 5 N seq for the mask, spread over batch and heads, and the zeros it selects from.
    - workspace: 4 t times the larger of two arrays of scores and (matrices up + 1) of F for each of `rows_per_token`,
      the gradients at the widest place of a block, and with remat what a block keeps without it, recomputed.
    - logits: t 8 V / `loss_chunks`: float32 exponentials, and the gradient.

    query_blocks: blocks of queries, each over the keys up to its own end: `attended_keys` takes the place of seq.
    fuses_mask: as XLA does for GPUs, which then has no mask in memory, and of the workspace `FUSED_WORKSPACE`.

    It describes blocks run by a scan. With the blocks unrolled, remat saves nothing under XLA on CPU (jax 0.10.2).

    Args:
      batch: sequences a step over all devices; `seq`: tokens a sequence.

    Raises:
      ValueError: a name is unknown, or the mesh or accumulation does not divide what it splits.
    Source: Korthikanti et al. 2022, arXiv:2205.05198, section 4 (activations); Rajbhandari et al. 2020,
      arXiv:1910.02054, section 3 (states).
    """
    mesh = mesh or MeshShape()
    check_known("optimizer", optimizer, OPTIMIZERS)
    check_known("precision", precision, PRECISIONS)
    check_known("residual", residual, PRECISIONS)
    check_known("remat", remat, REMAT_POLICIES)
    check_mesh(config, mesh, batch=batch, seq=seq, accumulation=accumulation)

    arrays = weight_arrays(config)
    operand = OPERAND_BYTES[precision]
    num_params = sum(values_on_device(array, array.num_params, mesh) for array in arrays)
    num_state = sum(values_on_device(array, optimizer_state_values(array, optimizer), mesh) for array in arrays)
    local_tokens = batch * seq // (accumulation * mesh.batch_shards * mesh.context)
    layers_here = config.layers // mesh.stage
    in_flight = min(mesh.stage, accumulation)
    heads, ffn = config.heads // mesh.tensor, config.ffn_size // mesh.tensor
    vocab = config.vocab // mesh.tensor
    kept_bytes = {
        policy: local_tokens
        * kept_bytes_per_token(
            config,
            seq=seq,
            remat=policy,
            tensor=mesh.tensor,
            residual=residual,
            precision=precision,
            query_blocks=query_blocks,
        )
        for policy in REMAT_POLICIES
    }
    final_norm_bytes = local_tokens * FLOAT32_BYTES * NORM_KEEPS * config.dim
    keys = attended_keys(seq, query_blocks)
    mask_bytes = 0 if fuses_mask else local_tokens * MASK_BYTES * heads * keys
    gradients_here = max(2 * heads * keys, math.ceil((num_up_matrices(config) + 1) * ffn * rows_per_token(config, seq)))
    workspace_bytes = FLOAT32_BYTES * local_tokens * gradients_here + (kept_bytes["none"] if remat != "none" else 0)
    return TrainMemory(
        parameters_bytes=FLOAT32_BYTES * num_params,
        gradients_bytes=FLOAT32_BYTES * num_params,
        accumulator_bytes=FLOAT32_BYTES * num_params if accumulation > 1 else 0,
        optimizer_bytes=FLOAT32_BYTES * num_state,
        compute_copies_bytes=compute_copies_bytes(arrays, operand=operand, mesh=mesh, tied=config.tied),
        activations_bytes=in_flight * layers_here * kept_bytes[remat] + final_norm_bytes + mask_bytes,
        workspace_bytes=math.ceil(workspace_bytes * (FUSED_WORKSPACE if fuses_mask else 1)),
        logits_bytes=2 * FLOAT32_BYTES * local_tokens * vocab // loss_chunks(local_tokens, vocab),
    )


def loss_chunks(num_tokens: int, vocab: int) -> int:
    """In how many equal chunks the trainer takes a device's tokens to compute their losses.

    The fewest that divide them and keep the float32 logits of one chunk within `LOGITS_BYTES`.

    >>> loss_chunks(8192, 128256), loss_chunks(4096, 256)
    (8, 1)
    """
    wanted = FLOAT32_BYTES * num_tokens * vocab / LOGITS_BYTES
    low = [n for n in range(1, math.isqrt(num_tokens) + 1) if num_tokens % n == 0]
    return min(n for n in (*low, *(num_tokens // n for n in low)) if n >= min(wanted, num_tokens))


def choose_query_blocks(backend: str, *, seq: int, precision: str, whole_sequences: bool) -> int:
    """Blocks of queries that the trainer's attention takes: in float32 on a CPU up to 4, elsewhere 1.

    Four leave 5/8 of the scores, and more gain little: blocks of fewer than `LEAST_QUERIES` are slower to multiply.
    XLA on CPU has no bfloat16 product for the layouts that slices come in.
    """
    if backend != "cpu" or precision != "float32" or not whole_sequences:
        return 1
    return next(n for n in (4, 2, 1) if n == 1 or (seq % n == 0 and seq // n >= LEAST_QUERIES))


def attended_keys(seq: int, query_blocks: int) -> int:
    """Keys that a query is multiplied with, on average, where each block of queries stops at its own end.

    >>> attended_keys(256, 1), attended_keys(256, 4)
    (256, 160)
    """
    return math.ceil(Fraction(seq * (query_blocks + 1), 2 * query_blocks))


def num_up_matrices(config: ModelConfig) -> int:
    return 2 if config.gated else 1


def activation_keeps(config: ModelConfig) -> int:
    """Arrays of F that differentiating the feed-forward layer needs, its matmul results and its output among them.

    From JAX 0.11.2 on one less for gelu_tanh: of tanh it keeps y alone, before also 1 - y.
    """
    return {"swiglu": 6, "gelu": 2, "gelu_tanh": 6}[config.activation]


def rows_per_token(config: ModelConfig, seq: int) -> Fraction:
    """Rows that the feed-forward layers multiply for each token: E C / seq, empty places among them; 1 if dense."""
    return Fraction(config.num_experts * config.capacity(seq), seq)


def kept_bytes_per_token(
    config: ModelConfig,
    *,
    seq: int,
    remat: str,
    tensor: int = 1,
    residual: str = "float32",
    precision: str = "bfloat16",
    query_blocks: int = 1,
) -> int:
    """Bytes that one block keeps for its backward pass, per token; heads and F are divided by `tensor`.

    With r bytes of residual stream, and 4 for all else, whatever the precision: operands are cast where they are used,
    but for the rows that experts get, of p bytes a value. F and what experts are given count `rows_per_token` times,
    and seq is `attended_keys`.

    - full: the block's input, r D.
    - dots: that, and the matmul results that the rest is recomputed from: (N + 2K) H for q, k, v; N seq for the scores;
      N H and D for the attention and its projection; F (twice when gated); D for the experts' results.
    - none: what autodiff keeps of this block: 3 D for each of two norms (input, normalised, scaled); (N + 2K) H;
      2 N seq (exponentials and probabilities); N H; the feed-forward layer's `activation_keeps` of F; with q/k norms
      2 (N + K) H more; with experts their rows, p D, and k D for the results that their weights multiply. Row
      statistics (one value a row) and the tables of the routing, a few values for each expert, are left out.
    """
    dim, head, rows = config.dim, config.head_size, rows_per_token(config, seq)
    heads, kv_heads, ffn = config.heads // tensor, config.num_kv_heads // tensor, config.ffn_size // tensor
    stream_bytes = OPERAND_BYTES[residual] * dim
    qkv = (heads + 2 * kv_heads) * head
    keys = attended_keys(seq, query_blocks)
    if remat == "full":
        return stream_bytes
    if remat == "dots":
        results = qkv + heads * keys + heads * head + dim + num_up_matrices(config) * ffn * rows
        results += dim * rows if config.experts else 0
        return stream_bytes + math.ceil(FLOAT32_BYTES * results)
    qk_norm = 2 * (heads + kv_heads) * head if config.qk_norm else 0
    attention = qkv + qk_norm + 2 * heads * keys + heads * head
    fed = FLOAT32_BYTES * activation_keeps(config) * ffn * rows
    if config.experts:
        fed += OPERAND_BYTES[precision] * dim * rows + FLOAT32_BYTES * config.num_active_experts * dim
    return FLOAT32_BYTES * (2 * NORM_KEEPS * dim + attention) + math.ceil(fed)


def optimizer_state_values(array: WeightArray, optimizer: str) -> int:
    """How many float32 values the optimizer keeps for one array.

    adam, adamw, nadamw and lamb: two moments. lion and sgd: one. muon: one for the blocks' matrices but routers, which
    it orthogonalises, and Adam's two for the rest. adafactor: a row and a column for an array whose two largest dims
    (the stacked layers among them) are both at least 128, so size / largest + size / second; else the full second
    moment.

    Source: the states of optax; Adafactor: Shazeer and Stern 2018, arXiv:1804.04235, section 3.
    """
    if optimizer in ("lion", "sgd"):
        return array.num_params
    if optimizer == "muon" and array.is_orthogonalised:
        return array.num_params
    if optimizer == "adafactor":
        *_, second, largest = (1, *sorted(array.shape))
        factored = len(array.shape) > 1 and second >= ADAFACTOR_SMALLEST_DIM
        return array.num_params // largest + array.num_params // second if factored else array.num_params
    return 2 * array.num_params


def array_shards(array: WeightArray, mesh: MeshShape) -> int:
    """In how many pieces an array is split: fsdp splits D, stage the stacked layers, and see `shards_in_use`."""
    return shards_in_use(array, mesh) * (mesh.fsdp if "D" in array.dims else 1) * (mesh.stage if array.stacked else 1)


def shards_in_use(array: WeightArray, mesh: MeshShape) -> int:
    """In how many pieces a layer's array is still split while it is used: tensor splits heads, F and V; expert E."""
    tensor = mesh.tensor if set(array.dims) & set("NKFV") else 1
    return tensor * (mesh.expert if "E" in array.dims else 1)


def values_on_device(array: WeightArray, num_values: int, mesh: MeshShape) -> int:
    """Values a device holds of those that mirror `array`; rows and columns of a factored state are not split."""
    return math.ceil(num_values / array_shards(array, mesh)) if num_values >= array.num_params else num_values


def compute_copies_bytes(arrays: Sequence[WeightArray], *, operand: int, mesh: MeshShape, tied: bool) -> int:
    """Bytes of the matrices cast to operands, plus what fsdp gathers to use at once: a block, or the output layer.

    A router, small, is used in float32.
    """
    multiplied = [array for array in arrays if array.is_orthogonalised or array.component == "head"]
    multiplied += [array for array in arrays if tied and array.component == "embedding"]
    cast = 0
    if operand != FLOAT32_BYTES:
        cast = sum(values_on_device(array, array.num_params, mesh) for array in multiplied)
    gathered = 0
    if mesh.fsdp > 1:
        one_block = [array for array in multiplied if array.stacked]
        block = sum(array.num_params // array.shape[0] // shards_in_use(array, mesh) for array in one_block)
        output = sum(array.num_params // shards_in_use(array, mesh) for array in multiplied if not array.stacked)
        gathered = max(block, output)
    return operand * (cast + gathered)

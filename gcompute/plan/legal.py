"""Which meshes a model and a batch can be split over, and why not where they cannot."""

from gcompute.config.architecture import Architecture, architecture
from gcompute.config.mesh import Axis, MeshShape
from gcompute.config.model import ModelConfig


def check_mesh(
    config: ModelConfig | Architecture,
    mesh: MeshShape,
    *,
    batch: int,
    seq: int,
    accumulation: int = 1,
    schedule: str = "1f1b",
    chunks: int = 1,
    context_attention: str = "ring",
) -> None:
    """Refuse a mesh that this model or batch cannot be split over.

    Args:
      batch: sequences a step over all devices; seq: tokens a sequence; accumulation: microbatches a step, a device.
      schedule, chunks, context_attention: as in TrainConfig.

    Raises:
      ValueError: a size that an axis does not divide, with the legal ones, or an axis that the model has no use for.
    """
    if batch < 1 or seq < 1 or accumulation < 1:
        raise ValueError(f"batch={batch}, seq={seq} and accumulation={accumulation} must all be at least 1.")
    model = architecture(config) if isinstance(config, ModelConfig) else config
    for group in model.layers:
        attention, fed = group.attention, group.feed_forward
        shares = {"heads": attention.heads, "kv_heads": attention.kv_heads, "ffn": fed.width, "vocab": model.vocab}
        _check(Axis.TENSOR, mesh.tensor, shares, "each device needs a whole share")
        if fed.experts:
            _check(Axis.EXPERT, mesh.expert, {"experts": fed.experts}, "each device needs whole experts")
    _check(Axis.FSDP, mesh.fsdp, {"dim": model.dim}, "each device keeps a whole share of every matrix")
    if mesh.expert > 1 and not any(group.feed_forward.experts for group in model.layers):
        raise ValueError(f"mesh expert={mesh.expert} needs a model with experts, and this one has none. Use expert=1.")
    _check_stages(model.num_layers, mesh.stage, chunks, schedule, accumulation)
    if mesh.context > 1:
        if context_attention == "ring":
            # Two pieces a device, one early and one late, share the causal work out evenly.
            pieces = {"seq / 2": seq // 2 if seq % 2 == 0 else 1}
            _check(Axis.CONTEXT, mesh.context, pieces, "each device takes two equal pieces of a sequence")
        else:
            _check(Axis.CONTEXT, mesh.context, {"seq": seq}, "each device takes an equal piece of a sequence")
            shares = {"heads / tensor": model.layers[0].attention.heads // mesh.tensor}
            _check(Axis.CONTEXT, mesh.context, shares, "ulysses deals the heads out over the context axis")
    shards = mesh.batch_shards * accumulation
    if batch % shards:
        axes = " x ".join(f"{axis.value}={mesh.size(axis)}" for axis in (Axis.DATA, Axis.FSDP, Axis.EXPERT))
        raise ValueError(
            f"batch={batch} does not divide over {axes} x accumulation={accumulation}: use a multiple of {shards}."
        )


def _check_stages(layers: int, stages: int, chunks: int, schedule: str, accumulation: int) -> None:
    if stages == 1:
        if chunks > 1:
            raise ValueError(f"pipeline_chunks={chunks} needs pipeline stages: give a mesh with stage=2 or more.")
        return
    whole = {"layers" if chunks == 1 else f"layers / pipeline_chunks={chunks}": layers // chunks}
    if layers % chunks:
        raise ValueError(f"pipeline_chunks={chunks} does not divide layers={layers}.")
    _check(Axis.STAGE, stages, whole, "each stage needs equally many layers")
    if accumulation < stages:
        raise ValueError(
            f"mesh stage={stages} with accumulation={accumulation} microbatches leaves stages idle throughout: use"
            f" accumulation={stages} or more."
        )
    if schedule == "interleaved" and accumulation % stages:
        raise ValueError(
            f"the interleaved schedule needs microbatches in groups of stage={stages}: accumulation={accumulation} is"
            f" not a multiple."
        )


def _check(axis: Axis, ways: int, sizes: dict[str, int], why: str) -> None:
    for name, size in sizes.items():
        if size % ways:
            legal = ", ".join(
                str(n) for n in range(1, min(sizes.values()) + 1) if all(size % n == 0 for size in sizes.values())
            )
            padded = -(-size // ways) * ways
            or_pad = f"; or pad the vocabulary: --vocab {padded}" if name == "vocab" else ""
            raise ValueError(
                f"mesh {axis.value}={ways} does not divide {name}={size}: {why}. Legal: {axis.value}={legal}{or_pad}."
            )

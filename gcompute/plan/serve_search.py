"""The meshes on which a model can be served on given chips."""

from collections.abc import Iterator

from gcompute.config.architecture import Architecture
from gcompute.config.mesh import MeshShape
from gcompute.hardware.target import Target
from gcompute.plan.links import routes
from gcompute.plan.serving import check_serving_mesh


def serving_meshes(model: Architecture, target: Target) -> Iterator[MeshShape]:
    """Every legal product of data, expert and tensor over all devices of `target`.

    >>> from gcompute.config.models import planned_model
    >>> meshes = serving_meshes(planned_model("llama3-8b").architecture, Target.parse("v5e:2x2"))
    >>> [str(mesh) for mesh in meshes]
    ['data=4', 'data=2,tensor=2', 'tensor=4']
    """
    num = target.num_devices
    widest = min(group.attention.heads for group in model.layers)
    experts = [group.feed_forward.experts for group in model.layers if group.feed_forward.experts]
    for tensor in (n for n in range(1, min(num, widest) + 1) if num % n == 0):
        for expert in (n for n in range(1, min(experts, default=1) + 1) if num // tensor % n == 0):
            mesh = MeshShape(data=num // (tensor * expert), expert=expert, tensor=tensor)
            try:
                check_serving_mesh(model, mesh)
                routes(mesh, target)
            except ValueError:
                continue
            yield mesh

"""Where a stage goes whose device is gone: to the one of its name if that is back, else to another
of the same kind that has the room. The other stages stay where they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.nodes import Node, free_gpus, look_at_nodes
from tightfit.cluster.placement import Place, needed_bytes
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.units import format_bytes
from tightfit.workers.api import StageSpec
from tightfit.workers.probing.result import PresentDevice
from tightfit.workers.shard_bytes import gpu_reserve_bytes


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device that Ray would start a stage on."""

    node: Node
    number: int
    """Among the node's devices of its kind."""
    gpu_uuid: str | None
    free_bytes: int
    """That a stage may take."""

    @property
    def device_id(self) -> str:
        """As in plans."""
        return f"{self.node.name}:{self.number}"


Look = Callable[
    [Sequence[Node], frozenset[str], frozenset[str]], Mapping[str, Sequence[PresentDevice]]
]


def is_there(
    spec: StageSpec, places: Sequence[Place], nodes: Sequence[Node], look: Look = look_at_nodes
) -> bool:
    """The device that a stage was on can be used. It cannot where its node does not answer: one may
    be dead before Ray knows it.

    Args:
        spec: of the stage.
        places: of all stages of its service.
        nodes: of the cluster, alive.
        look: at the devices of nodes; see `look_at_nodes`.
    """
    own = places[spec.stage_index]
    here = [node for node in nodes if node.ray_id == own.ray_node_id]
    if not here or own.gpu_uuid is None:
        return bool(here)
    try:
        (present,) = look(here, frozenset({"gpu"}), _held_by_others(spec, places)).values()
    except PlacementError:
        return False
    return any(device.uuid == own.gpu_uuid for device in present)


def _held_by_others(spec: StageSpec, places: Sequence[Place]) -> frozenset[str]:
    """GPUs of the service's other stages."""
    others = (place for index, place in enumerate(places) if index != spec.stage_index)
    return frozenset(place.gpu_uuid for place in others if place.gpu_uuid is not None)


def relocate(
    plan: Plan,
    spec: StageSpec,
    places: Sequence[Place],
    nodes: Sequence[Node],
    look: Look = look_at_nodes,
) -> tuple[StageSpec, Place]:
    """The stage on another device than its own, which is gone.

    Args:
        plan: that is served.
        spec: of the stage, as it was.
        places: of all its stages.
        nodes: of the cluster, alive.
        look: at the devices of nodes; see `look_at_nodes`.

    Raises:
        PlacementError: none has the room; each is named with what it has.
    """
    kind = plan.stages[spec.stage_index].kind
    roomy = [node for node in nodes if node.has_room(kind)]
    return choose(plan, spec, roomy, look(roomy, frozenset({kind}), _held_by_others(spec, places)))


def choose(
    plan: Plan,
    spec: StageSpec,
    nodes: Sequence[Node],
    devices: Mapping[str, Sequence[PresentDevice]],
) -> tuple[StageSpec, Place]:
    """The stage on the device of its name, else on the one that has the most room.

    Args:
        plan: that is served.
        spec: of the stage.
        nodes: with room, by Ray's count.
        devices: of each, by its name, that none of our stages holds.

    Raises:
        PlacementError: see `relocate`.
    """
    stage = plan.stages[spec.stage_index]
    needed, threads = needed_bytes(plan, stage), spec.num_threads or 1
    found = [c for node in nodes for c in _candidates(node, devices[node.name], stage.kind)]
    fit = [c for c in found if c.free_bytes >= needed and c.node.free_cpus >= threads]
    if not fit:
        there = "; ".join(
            f"{c.device_id}: {format_bytes(c.free_bytes)} and {c.node.free_cpus} CPUs"
            for c in found
        )
        raise PlacementError(
            f"the device of stage {spec.stage_index}, {spec.planned_device or stage.device}, is "
            f"gone, and no other {stage.kind} has {format_bytes(needed)} and {threads} CPUs free; "
            f"there are {there or 'none at all'}. Start that node again, or add one like it"
        )
    best = max(fit, key=lambda c: (c.device_id == stage.device, c.free_bytes, c.device_id))
    budget = min(stage.usable_bytes, best.free_bytes)
    return (
        dataclasses.replace(spec, planned_device=best.device_id, memory_budget_bytes=budget),
        Place(ray_node_id=best.node.ray_id, gpu_uuid=best.gpu_uuid),
    )


def _candidates(node: Node, devices: Sequence[PresentDevice], kind: str) -> Iterator[Candidate]:
    alike = [device for device in devices if device.kind == kind]
    free = {device.uuid: device.free_bytes for device in alike}
    nobodys = free_gpus(free, node) if kind == "gpu" else set(free)
    for device in alike:
        if device.uuid in nobodys:
            reserve = gpu_reserve_bytes(device.total_bytes) if kind == "gpu" else 0
            yield Candidate(
                node=node,
                number=int(device.device.partition(":")[2] or 0),
                gpu_uuid=device.uuid,
                free_bytes=max(0, device.free_bytes - reserve),
            )

"""The devices that are there, as an inventory: of this machine, or of a Ray cluster's nodes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.measured import ROUNDED_TO, inventory_tree
from tightfit.cluster.nodes import (
    KINDS,
    Node,
    alive_nodes,
    free_gpus,
    look_at_nodes,
    probe_nodes,
    without_held,
)
from tightfit.cluster.placement import Place
from tightfit.cluster.planning.inventory import Device, DeviceType, Inventory, parse_inventory
from tightfit.cluster.planning.plan import Plan, StagePlan
from tightfit.workers.probing.result import (
    DeviceMemory,
    DeviceProbe,
    LinkRate,
    NodeProbe,
    PresentDevice,
)
from tightfit.workers.shard_bytes import gpu_reserve_bytes

HOST_RESERVE_BYTES: Final = 2 * 2**30
HOST_RESERVE_SHARE: Final = 20
"""Of a host, what stays free for everything else on it: 2 GiB and a twentieth of the total."""


def probe_here(device: str) -> NodeProbe:
    """This machine, measured.

    Raises:
        ProbeError: see `workers.probe.probe_node`.
    """
    from tightfit.workers.node_tasks import probe_this_node

    return probe_this_node(os.uname().nodename, device)


def live_inventory(
    probes: Sequence[NodeProbe],
    device: str,
    *,
    between: LinkRate | None = None,
    cpu_budget_bytes: int | None = None,
) -> Inventory:
    """The devices of one kind that a plan may use.

    Args:
        probes: of each node.
        device: "cuda", "cpu", or "auto": GPUs where there are any.
        between: the slowest link from host to host, where there are several.
        cpu_budget_bytes: what may be taken of each host; None: what is free less a reserve.

    Raises:
        PlacementError: there is none, or a host has not so much free.
    """
    kinds = {d.kind for probe in probes for d in probe.devices if d.rates is not None}
    kind = KINDS.get(device, "gpu" if "gpu" in kinds else "cpu")
    if kind not in kinds:
        notes = "; ".join(note for probe in probes for note in probe.notes)
        raise PlacementError(
            f"no {kind} that a plan could use on {', '.join(probe.node for probe in probes)}"
            + (f": {notes}" if notes else "")
        )
    wanted = [
        replace(probe, devices=tuple(d for d in probe.devices if d.kind == kind))
        for probe in probes
    ]
    tree = inventory_tree(wanted, lambda found: planned_bytes(found, cpu_budget_bytes), between)
    return parse_inventory(tree, "what was measured")


def planned_bytes(device: DeviceProbe, cpu_budget_bytes: int | None) -> int:
    """What a plan may take of a device: of a GPU what is free, the plan's own reserve being taken
    off later; of a host what is declared, or left by a reserve.

    Raises:
        PlacementError: a host has not so much free.
    """
    memory = device.memory
    if device.kind == "gpu":
        return memory.free_bytes // ROUNDED_TO * ROUNDED_TO
    if cpu_budget_bytes is None:
        reserve = HOST_RESERVE_BYTES + memory.total_bytes // HOST_RESERVE_SHARE
        return max(0, memory.free_bytes - reserve) // ROUNDED_TO * ROUNDED_TO
    if cpu_budget_bytes > memory.free_bytes:
        raise PlacementError(
            f"a budget of {cpu_budget_bytes:,} bytes is more than the {memory.free_bytes:,} that "
            f"are free on the host (by {memory.bound_by}): ask for less, or free some"
        )
    return cpu_budget_bytes


class Surroundings:
    """The devices around a running service: those that it is on, as if they held nothing, and
    what else the cluster has by now.

    Rates are measured once for each node that joins, and never on a node that holds a stage, ours
    or another service's: that would slow it down. Of nodes of ours, GPUs that hold none are looked
    at. What Ray has given to others is not there for us.

    Args:
        plan: what is served.
        base: devices that were known when it was planned; none: those of the plan.
        places: of its stages.
        cpu_budget_bytes: see `live_inventory`.
    """

    def __init__(
        self,
        plan: Plan,
        base: Sequence[Device],
        places: Sequence[Place],
        *,
        cpu_budget_bytes: int | None = None,
    ) -> None:
        self._kind = plan.stages[0].kind
        held = {place.ray_node_id for place in places}
        names = {stage.node for stage in plan.stages}
        found = list(base) or [_planned_device(stage) for stage in plan.stages]
        self._base = [device for device in found if device.node in names]
        self._held_ids = held
        self._held_gpus = frozenset(p.gpu_uuid for p in places if p.gpu_uuid is not None)
        self._used = {stage.device for stage in plan.stages}
        self._known: dict[str, NodeProbe] = {}  # by Ray's id, as names come back with other nodes
        self._cpu_budget_bytes = cpu_budget_bytes

    def inventory(self) -> Inventory:
        """What there is now.

        Raises:
            PlacementError: the cluster does not answer.
        """
        nodes = [node for node in alive_nodes() if node.may_hold(self._kind)]
        others = [node for node in nodes if node.ray_id not in self._held_ids]
        return Inventory(devices=(*self._ours(nodes), *self._others(others)))

    def _ours(self, nodes: Sequence[Node]) -> list[Device]:
        if self._kind == "cpu":
            return self._base
        held = [node for node in nodes if node.ray_id in self._held_ids]
        seen = look_at_nodes(held, frozenset({"gpu"}), self._held_gpus)
        free: dict[str | None, int] = {}
        for node in held:
            found = {device.uuid: device.free_bytes for device in seen[node.name]}
            free |= {uuid: found[uuid] for uuid in free_gpus(found, node)}
        return [
            device if device.device_id in self._used
            else replace(device, free_bytes=free.get(device.uuid, 0))
            for device in self._base
        ]  # fmt: skip

    def _others(self, nodes: Sequence[Node]) -> tuple[Device, ...]:
        device = "cuda" if self._kind == "gpu" else "cpu"
        roomy = [node for node in nodes if node.has_room(self._kind)]
        fresh = [node for node in roomy if node.is_idle and node.ray_id not in self._known]
        for node, probe in zip(fresh, probe_nodes(fresh, device), strict=True):
            self._known[node.ray_id] = probe
        known = [node for node in roomy if node.ray_id in self._known]
        seen = look_at_nodes(known, frozenset({self._kind}))
        now = [
            without_held(_as_now(self._known[node.ray_id], seen[node.name]), node) for node in known
        ]
        if not any(probe.devices for probe in now):
            return ()
        return live_inventory(now, device, cpu_budget_bytes=self._cpu_budget_bytes).devices


def _as_now(probe: NodeProbe, devices: Sequence[PresentDevice]) -> NodeProbe:
    """A node's measurements with its memory as it is now; devices that are gone are left out."""
    memory = {
        (device.device, device.uuid): DeviceMemory(
            total_bytes=device.total_bytes, free_bytes=device.free_bytes, bound_by="a later look"
        )
        for device in devices
    }
    kept = [d for d in probe.devices if (d.device, d.uuid) in memory]
    return replace(probe, devices=tuple(replace(d, memory=memory[d.device, d.uuid]) for d in kept))


def _planned_device(stage: StagePlan) -> Device:
    """A device as far as a plan tells of it: with the room that it has for a stage."""
    reserve = gpu_reserve_bytes(stage.usable_bytes) if stage.kind == "gpu" else 0
    kind = DeviceType(
        name=stage.type,
        kind=stage.kind,
        memory_bytes=stage.usable_bytes,
        gb_per_s=stage.gb_per_s,
        fp16_tflops=max(0.001, stage.tera_ops),
        int8_tops=max(0.001, stage.tera_ops),
        price=stage.price,
        watts=stage.watts,
    )
    return Device(
        device_id=stage.device,
        node=stage.node,
        type=kind,
        total_bytes=stage.usable_bytes,
        free_bytes=stage.usable_bytes + reserve,
        price=stage.price,
        uuid=stage.uuid,
    )

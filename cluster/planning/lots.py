"""Which devices of an inventory may be used together."""

from __future__ import annotations

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.inventory import Device
from tightfit.cluster.planning.request import PlanRequest


def device_lots(request: PlanRequest) -> tuple[str, list[list[Device]]]:
    """The kind of all devices ("gpu", "cpu"), and those of each node that comes into question; or
    all together, where they need not be on one.

    Raises:
        PlacementError: a device is named that is not there, none is left, or they are of two kinds;
            or layers pinned to devices overlap.
    """
    known = {
        name
        for device in request.inventory.devices
        for name in (device.device_id, device.node, device.type.name)
    }
    ids = {device.device_id for device in request.inventory.devices}
    for name in sorted({*request.exclude} - known) + sorted({*request.pins} - ids):
        raise PlacementError(f"the inventory has no {name}, which is to be excluded or pinned")
    devices = [
        device
        for device in request.inventory.devices
        if request.exclude.isdisjoint((device.device_id, device.node, device.type.name))
    ]
    kinds = sorted({device.type.kind for device in devices})
    if len(kinds) != 1:
        raise PlacementError(
            f"a pipeline is on devices of one kind, and these are of {' and '.join(kinds)}: "
            "exclude one"
            if kinds
            else "every device of the inventory is excluded"
        )
    _check_pins(request, {device.device_id for device in devices})
    if not request.same_node:
        return kinds[0], [devices]
    by_node: dict[str, list[Device]] = {}
    for device in devices:
        by_node.setdefault(device.node, []).append(device)
    # Of nodes that are alike, the first.
    distinct: dict[tuple[object, ...], list[Device]] = {}
    for on_node in by_node.values():
        if request.pins.keys() <= {device.device_id for device in on_node}:
            alike = sorted((d.type.name, d.free_bytes, d.total_bytes, d.price) for d in on_node)
            distinct.setdefault(tuple(alike), on_node)
    return kinds[0], list(distinct.values())


def _check_pins(request: PlanRequest, ids: set[str]) -> None:
    taken = 0
    for device_id, (first, end) in sorted(request.pins.items(), key=lambda pin: pin[1]):
        if device_id not in ids:
            raise PlacementError(f"{device_id} has layers pinned to it, and is excluded")
        if not taken <= first < end <= request.model.num_layers:
            raise PlacementError(
                f"layers {first}-{end - 1} pinned to {device_id} overlap with others, or are not "
                f"among the model's {request.model.num_layers}"
            )
        taken = end

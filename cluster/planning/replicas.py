"""How many pipelines an inventory holds, each with the whole model and room for the workload.

First one after the other: the best plan, then the best on what it leaves, and so on. Where simple
bounds do not say that there can be no more, every way of dividing the devices is looked at: devices
with the same room are a class, a pipeline is so many of each class that just hold the model, and
all sums of such pipelines are made. Where there are too many ways, bounds are what is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.assembly import make_plan, on_few_nodes
from tightfit.cluster.planning.inventory import Device
from tightfit.cluster.planning.layout import DeviceClass
from tightfit.cluster.planning.packing import packer_for
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.planning.planner import Search, Solution, searches, solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.request import PlanRequest

MAX_REPLICAS = 64
MAX_COUNTS = 4096
"""Ways to take some devices of each class, up to which all are looked at."""
MAX_SUMS = 1_000_000
"""Of pipelines, that are made."""

Counts = tuple[int, ...]
"""Devices of each class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """Pipelines on devices of their own."""

    plans: tuple[Plan, ...]
    most: int
    """No more are possible; the number itself where that is proven."""
    proof: str
    """What is known of the greatest number."""


def make_replicas(name: str, request: PlanRequest, wanted: int | None, first: Solution) -> Replicas:
    """So many pipelines, or as many as possible.

    If they come by taking the best plan on what is left again and again, they are these, the first
    being the best plan of all. Limits of the request on devices and dollars are for each pipeline.

    Args:
        name: of the model, as plans are to give it.
        request: for one pipeline, without pins.
        wanted: how many; None: as many as possible, at most 64.
        first: of `solve` for the request.

    Raises:
        PlacementError: there are not so many, or layers are pinned.
    """
    if request.pins:
        raise PlacementError("layers are pinned to devices of one pipeline: leave pins or replicas")
    target = MAX_REPLICAS if wanted is None else wanted
    plans = _one_after_the_other(name, request, target, first)
    bound, why = _bound(request)
    if len(plans) >= target:
        return Replicas(plans=plans, most=max(len(plans), bound), proof=f"at most {bound}: {why}")
    if len(plans) >= bound:
        proof = f"there can be no more: {why}"
    else:
        divided = _divide(request)
        if divided is None:
            bound = max(bound, len(plans))
            proof = f"{len(plans)} were found one after the other; at most {bound}: {why}"
        else:
            bound = len(divided)
            proof = "there can be no more: every way of dividing the devices was looked at"
            if len(plans) < min(bound, target):
                plans = tuple(
                    make_plan(name, _only(request, devices)) for devices in divided[:target]
                )
    if wanted is not None and len(plans) < wanted:
        raise PlacementError(
            f"{wanted} pipelines are asked for, and the inventory holds {len(plans)} of {name}: "
            f"{proof}. Ask for fewer, or add devices"
        )
    return Replicas(plans=plans, most=bound, proof=proof)


def _one_after_the_other(
    name: str, request: PlanRequest, target: int, first: Solution
) -> tuple[Plan, ...]:
    plans = [make_plan(name, request, first)]
    left = list(request.inventory.devices)
    while len(plans) < target:
        used = {stage.device for stage in plans[-1].stages}
        left = [device for device in left if device.device_id not in used]
        rest = _usable(request, left)
        if not rest:
            break
        smaller = replace(_only(request, rest), same_node=request.same_node)
        found = solve(smaller)
        if found is None:
            break
        plans.append(make_plan(name, smaller, found))
    return tuple(plans)


def _usable(request: PlanRequest, devices: Sequence[Device]) -> list[Device]:
    """All but the excluded."""
    return [
        device
        for device in devices
        if request.exclude.isdisjoint((device.device_id, device.node, device.type.name))
    ]


def _only(request: PlanRequest, devices: Sequence[Device]) -> PlanRequest:
    """The same for these devices, which may be on several nodes."""
    inventory = replace(request.inventory, devices=tuple(devices))
    return replace(request, inventory=inventory, exclude=frozenset(), same_node=False)


def _bound(request: PlanRequest) -> tuple[int, str]:
    """No more pipelines are possible, and why."""
    every = _usable(request, request.inventory.devices)
    fewest = solve(replace(request, objective=Objective.DEVICES))
    assert fewest is not None
    by_number = len(every) // len(fewest.runs)
    num_layers = request.model.num_layers
    ways = [
        (search, min(search.parts.layers) + request.needed_blocks * search.parts.kv_block)
        for search in searches(_only(request, every))
    ]
    layers = sum(
        max(search.candidate(device).room // each for search, each in ways) for device in every
    )
    if layers // num_layers < by_number:
        return layers // num_layers, (
            f"the {len(every)} devices hold {layers:,} layers with their KV cache, and a pipeline "
            f"has {num_layers}"
        )
    return by_number, (f"a pipeline takes at least {len(fewest.runs)} of the {len(every)} devices")


# -- every way of dividing the devices -----------------------------------------------------------


def _divide(request: PlanRequest) -> list[list[Device]] | None:
    """The devices of each of as many pipelines as possible; None: there are too many ways."""
    every = _usable(request, request.inventory.devices)
    by_node: dict[str, list[Device]] = {}
    for device in every:
        by_node.setdefault(device.node if request.same_node else "", []).append(device)
    found: list[list[Device]] = []
    for devices in by_node.values():
        lot = _Lot(_only(request, devices), devices)
        divided = lot.divide()
        if divided is None:
            return None
        found += divided
    return found


class _Lot:
    """Devices that may be used together, in classes of one room (and price, where that counts).

    Args:
        request: for them.
        devices: the same.
    """

    def __init__(self, request: PlanRequest, devices: Sequence[Device]) -> None:
        self._request = request
        self._searches: list[Search] = list(searches(request))
        is_priced = request.max_dollars is not None
        self._members: dict[Counts, list[Device]] = {}
        """By price in microdollars, where that counts, and the room in each of the searches."""
        for device in devices:
            candidates = [search.candidate(device) for search in self._searches]
            price = candidates[0].microdollars if is_priced else 0
            key = (price, *(one.room for one in candidates))
            self._members.setdefault(key, []).append(device)
        self._classes = sorted(self._members, reverse=True)
        self._number = tuple(len(self._members[key]) for key in self._classes)

    def divide(self) -> list[list[Device]] | None:
        """The devices of each pipeline; None: there are too many ways."""
        if prod(number + 1 for number in self._number) > MAX_COUNTS:
            return None
        pipelines = list(self._pipelines())
        sums = self._most(pipelines)
        return None if sums is None else self._devices(sums)

    def _pipelines(self) -> Iterator[Counts]:
        """Devices of each class that hold the model, and of which no fewer do."""
        kept: list[Counts] = []
        every = product(*(range(number + 1) for number in self._number))
        for counts in sorted(every, key=sum):
            if not any(_holds(counts, smaller) for smaller in kept) and self._fits(counts):
                kept.append(counts)
                yield counts

    def _fits(self, counts: Counts) -> bool:
        request, size = self._request, sum(counts)
        if not 0 < size <= min(request.model.num_layers, request.max_devices or size):
            return False
        if request.max_dollars is not None:
            microdollars = sum(n * key[0] for n, key in zip(counts, self._classes, strict=True))
            if microdollars > int(request.max_dollars * 1_000_000):
                return False
        return any(self._fits_so(counts, number) for number in range(len(self._searches)))

    def _fits_so(self, counts: Counts, number: int) -> bool:
        """With embedding and KV cache stored in one of the ways that come into question."""
        search, blocks = self._searches[number], self._request.needed_blocks
        rooms: Counter[int] = Counter()
        for n, key in zip(counts, self._classes, strict=True):
            rooms[key[1 + number]] += n
        each = min(search.parts.layers) + blocks * search.parts.kv_block
        if sum(room // each * n for room, n in rooms.items()) < len(search.parts.layers):
            return False
        classes = [
            DeviceClass(group=0, room=room, number=n) for room, n in sorted(rooms.items()) if n
        ]
        packer = packer_for(search.parts, classes[::-1], (sum(counts),))
        return packer.fits(blocks, search.level.min_better)

    def _most(self, pipelines: Sequence[Counts]) -> list[Counts] | None:
        """As many as possible that are there together; None: there are too many sums."""
        # Of so many pipelines, all devices that they may take together: from what, with which.
        sums: list[dict[Counts, tuple[Counts, Counts]]] = [{(0,) * len(self._number): ((), ())}]
        made = 0
        while sums[-1]:
            longer: dict[Counts, tuple[Counts, Counts]] = {}
            made += len(sums[-1]) * len(pipelines)
            if made > MAX_SUMS:
                return None
            for before, one in product(sums[-1], pipelines):
                together = tuple(a + b for a, b in zip(before, one, strict=True))
                if _holds(self._number, together):
                    longer.setdefault(together, (before, one))
            sums.append(longer)
        taken, found = min(sums[-2], key=lambda counts: (sum(counts), counts)), []
        for step in reversed(sums[1:-1]):
            taken, one = step[taken]
            found.append(one)
        return sorted(found, key=lambda counts: (sum(counts), counts))

    def _devices(self, pipelines: Sequence[Counts]) -> list[list[Device]]:
        """Of each, on as few nodes as may be."""
        left = dict(self._members)
        found = []
        for counts in pipelines:
            wanted = {key: n for key, n in zip(self._classes, counts, strict=True) if n}
            taken = on_few_nodes(wanted, {key: left[key] for key in wanted})
            for key, devices in taken.items():
                used = {device.device_id for device in devices}
                left[key] = [device for device in left[key] if device.device_id not in used]
            found.append([device for devices in taken.values() for device in devices])
        return found


def _holds(more: Counts, fewer: Counts) -> bool:
    return all(a >= b for a, b in zip(more, fewer, strict=True))

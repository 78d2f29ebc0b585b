"""Which devices hold which layers in which formats: exact and deterministic.

In this order: the model and the workload's KV blocks fit; the quality is at least what was asked;
the cost (devices, or dollars) is least; where spare memory is to go to quality, as many layers as
possible are in the better format; KV tokens on the worst stage are most; the slowest stage is
fastest. The same request has the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.inventory import Device
from tightfit.cluster.planning.memory import Parts
from tightfit.cluster.planning.packing import Packer, Run
from tightfit.cluster.planning.pools import Candidate, Choice, Pools
from tightfit.cluster.planning.request import (
    Level,
    PlanRequest,
    Spare,
    Variant,
    levels,
    parts_of,
    variants,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """The best way, as numbers."""

    score: Score
    variant: Variant
    level: Level
    pools: Pools
    choice: Choice
    packer: Packer
    """Of the devices that come into question."""
    runs: tuple[Run, ...]
    """Stages, first to last."""
    kv_blocks: int


class Score(NamedTuple):
    """Of a solution; the least is the best."""

    cost: tuple[int, int]
    """As `Choice.cost`."""
    quality: tuple[int, int]
    """Level and layers in its better format, both negative."""
    kv_blocks: int
    """On every stage, negative."""
    slowest_ns: int


def solve(request: PlanRequest) -> Solution | None:
    """The best way to lay the model over the devices; None: there is none.

    Raises:
        PlacementError: the request makes no sense for this model or inventory.
    """
    found = [search.best() for search in searches(request)]
    solutions = [solution for solution in found if solution is not None]
    return min(solutions, key=lambda solution: solution.score, default=None)


def fits(request: PlanRequest) -> bool:
    """There is a way at all.

    Raises:
        PlacementError: the request makes no sense for this model or inventory.
    """
    return any(search.cheapest() for search in searches(request))


def searches(request: PlanRequest) -> Iterator[Search]:
    """One for each node, or all nodes together, and each way to store what is not a layer."""
    kind, lots = _lots(request)
    ladder = levels(request, kind)
    found = variants(request, ladder[0], kind)
    for devices in lots:
        for variant in found:
            yield Search(request, ladder, variant, devices, kind)


def _lots(request: PlanRequest) -> tuple[str, list[list[Device]]]:
    """The kind of all devices, and those that may be used together."""
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


class Search:
    """The best way with some devices, embedding and KV cache being stored in one way."""

    def __init__(
        self,
        request: PlanRequest,
        ladder: Sequence[Level],
        variant: Variant,
        devices: Sequence[Device],
        kind: str,
    ) -> None:
        self.request, self.variant = request, variant
        self._ladder = ladder if request.spare is Spare.QUALITY else ladder[:1]
        self._parts = [parts_of(request, variant, level, kind) for level in self._ladder]
        limit = request.max_dollars
        self.pools = Pools(
            [self._candidate(device) for device in devices],
            request.objective,
            max_devices=request.max_devices,
            max_microdollars=None if limit is None else int(limit * 1_000_000),
        )

    def _candidate(self, device: Device) -> Candidate:
        room = max(0, self.request.inventory.usable(device) - self._parts[0].workspace)
        room -= room % self.request.room_grain_bytes
        return Candidate(device=device, room=room, only=self.request.pins.get(device.device_id))

    @property
    def level(self) -> Level:
        """Of fewest bits."""
        return self._ladder[0]

    @property
    def parts(self) -> Parts:
        """In that level."""
        return self._parts[0]

    def packer(self, counts: Sequence[int], level: int = 0) -> Packer:
        """Of the roomiest devices, so many of each group."""
        return Packer(
            self._parts[level],
            self.pools.roomiest(counts),
            counts,
            read_blocks=self.request.needed_blocks,
        )

    def choices(self) -> Iterator[Choice]:
        """What might hold the model in the lowest level, cheapest first."""
        each = min(self.parts.layers) + self.request.needed_blocks * self.parts.kv_block
        return self.pools.choices(each, len(self.parts.layers))

    def most_layers(self) -> int:
        """An upper bound for the layers that the devices which may be used hold in the lowest
        level, with the workload's KV blocks; exact where devices are of few classes."""
        blocks, num_layers = self.request.needed_blocks, len(self.parts.layers)
        each = min(self.parts.layers) + blocks * self.parts.kv_block
        most = min(num_layers, self.request.max_devices or num_layers)
        rooms = sorted((one.room for group in self.pools.groups for one in group), reverse=True)
        by_number = sum(room // each for room in rooms[:most])
        if by_number < num_layers or len(self.pools.groups) > 1:
            return by_number
        counts = (min(most, len(rooms)),)
        return self.packer(counts).furthest(blocks)

    def cheapest(self) -> list[Choice]:
        """All choices of least cost that hold the model."""
        found: list[Choice] = []
        for choice in self.choices():
            if found and choice.cost > found[0].cost:
                break
            blocks, level = self.request.needed_blocks, self._ladder[0]
            if self.packer(choice.counts).fits(blocks, level.min_better):
                found.append(choice)
        return found

    def best(self) -> Solution | None:
        """The best way; None: there is none."""
        choices = self.cheapest()
        if not choices:
            return None
        number, better, choices = self._best_quality(choices)
        blocks, choices = self._most_blocks(number, better, choices)
        best_ns, best = None, None
        for choice in choices:
            packer = Packer(
                self._parts[number],
                self.pools.in_question(choice.counts),
                choice.counts,
                read_blocks=self.request.needed_blocks,
            )
            slowest = _fastest(packer, blocks, better)
            if best_ns is None or slowest < best_ns:
                best_ns, best = slowest, (choice, packer)
        assert best is not None
        assert best_ns is not None
        is_quality = self.request.spare is Spare.QUALITY
        return Solution(
            score=Score(
                cost=best[0].cost,
                quality=(-number, -better) if is_quality else (0, 0),
                kv_blocks=-blocks,
                slowest_ns=best_ns,
            ),
            variant=self.variant,
            level=self._ladder[number],
            pools=self.pools,
            choice=best[0],
            packer=best[1],
            runs=tuple(best[1].pack(blocks, best_ns)),
            kv_blocks=blocks,
        )

    def _best_quality(self, choices: list[Choice]) -> tuple[int, int, list[Choice]]:
        """(Number of the level, layers in its better format, the choices that can have them)."""
        blocks = self.request.needed_blocks
        for number in reversed(range(len(self._ladder))):
            level = self._ladder[number]
            if number == 0 and self.request.spare is Spare.KV:
                return 0, level.min_better, choices
            most = {c: self.packer(c.counts, number).most_better(blocks) for c in choices}
            best = max((n for n in most.values() if n is not None), default=-1)
            if best >= level.min_better:
                return number, best, [c for c in choices if most[c] == best]
        raise AssertionError("the lowest level fits")

    def _most_blocks(
        self, level: int, better: int, choices: list[Choice]
    ) -> tuple[int, list[Choice]]:
        """(KV blocks on every stage, the choices that have room for them)."""
        packers = {choice: self.packer(choice.counts, level) for choice in choices}
        most = 0
        for packer in packers.values():
            parts = packer.parts
            left = sum(c.room * c.number for c in packer.classes) - sum(parts.layers)
            left -= better * parts.step + parts.embedding + min(parts.head, parts.lone_head)
            most = max(most, left // (parts.kv_block * len(parts.layers)))

        def works(blocks: int) -> bool:
            return any(packer.fits(blocks, better) for packer in packers.values())

        blocks = last_that(works, self.request.needed_blocks, most)
        return blocks, [c for c, packer in packers.items() if packer.fits(blocks, better)]


def _fastest(packer: Packer, blocks: int, better: int) -> int:
    """Least nanoseconds in which the slowest stage reads what a step needs."""
    slowest = max(packer.stage_ns(run) for run in packer.pack(blocks))
    return slowest - last_that(
        lambda saved: packer.fits(blocks, better, slowest - saved), 0, slowest
    )


def last_that(works: Callable[[int], bool], first: int, last: int) -> int:
    """The last of [first, last] that works, where the first does and none after one that fails."""
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if works(middle) else (first, middle - 1)
    return first

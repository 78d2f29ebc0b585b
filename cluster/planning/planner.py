"""Which devices hold which layers in which formats: exact and deterministic.

In this order: the model and the workload's KV blocks fit; the quality is at least what was asked;
the cost (devices, or dollars) is least; where spare memory is to go to quality, as many layers as
possible are in the better format; KV tokens on the worst stage are most; the slowest stage is
fastest. The same request has the same plan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from tightfit.cluster.planning.inventory import Device
from tightfit.cluster.planning.layout import Packer, Run
from tightfit.cluster.planning.lots import device_lots
from tightfit.cluster.planning.memory import Parts
from tightfit.cluster.planning.pace import pace_of
from tightfit.cluster.planning.packing import packer_for
from tightfit.cluster.planning.pools import Candidate, Choice, Paces, Pools
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
    pace: Paces
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
    rivals = _cheapest(list(searches(request)))
    bounds = [search.bound(choices) for search, choices in rivals]
    best: tuple[Score, int] | None = None
    solution = None
    # Where there are many nodes to choose from, the most promising spares looking at the others.
    for number in sorted(range(len(rivals)), key=lambda i: (bounds[i], i)):
        if best is not None and bounds[number] > best[0]:
            break
        search, choices = rivals[number]
        one = search.best(choices)
        if best is None or (one.score, number) < best:
            best, solution = (one.score, number), one
    return solution


def _cheapest(found: Sequence[Search]) -> list[tuple[Search, list[Choice]]]:
    """Those that hold the model at the least cost of all, with the choices that do."""
    # What might do costs no more than what does: many nodes need not be looked into.
    first = {n: next(search.choices(), None) for n, search in enumerate(found)}
    promising = sorted((choice.cost, n) for n, choice in first.items() if choice is not None)
    rivals: list[tuple[int, Search, list[Choice]]] = []
    for bound, number in promising:
        if rivals and bound > rivals[0][2][0].cost:
            break
        if choices := found[number].cheapest():
            if rivals and choices[0].cost < rivals[0][2][0].cost:
                rivals.clear()
            if not rivals or choices[0].cost == rivals[0][2][0].cost:
                rivals.append((number, found[number], choices))
    return [(search, choices) for _, search, choices in sorted(rivals, key=lambda one: one[0])]


def fits(request: PlanRequest) -> bool:
    """There is a way at all.

    Raises:
        PlacementError: the request makes no sense for this model or inventory.
    """
    return any(search.cheapest() for search in searches(request))


def searches(request: PlanRequest) -> Iterator[Search]:
    """One for each node, or all nodes together, and each way to store what is not a layer."""
    kind, lots = device_lots(request)
    ladder = levels(request, kind)
    if request.spare is Spare.KV:
        ladder = ladder[:1]
    found = [
        (variant, [parts_of(request, variant, level, kind) for level in ladder])
        for variant in variants(request, ladder[0], kind)
    ]
    for devices in lots:
        for variant, parts in found:
            yield Search(request, ladder, variant, parts, devices)


class Search:
    """The best way with some devices, embedding and KV cache being stored in one way.

    Args:
        request: what is asked for.
        ladder: levels of quality that it may choose from, fewest bits first.
        variant: how embedding and KV cache are stored.
        parts: the model's, in each level.
        devices: that may be used together.
    """

    def __init__(
        self,
        request: PlanRequest,
        ladder: Sequence[Level],
        variant: Variant,
        parts: Sequence[Parts],
        devices: Sequence[Device],
    ) -> None:
        self.request, self.variant = request, variant
        self._ladder, self._parts = ladder, parts
        limit = request.max_dollars
        self.pools = Pools(
            [self.candidate(device) for device in devices],
            request.objective,
            max_devices=request.max_devices,
            max_microdollars=None if limit is None else int(limit * 1_000_000),
        )

    def candidate(self, device: Device) -> Candidate:
        """A device, and its room for weights and KV blocks."""
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
        return packer_for(self._parts[level], self.pools.roomiest(counts), counts)

    def pace(self, counts: Sequence[int], level: int) -> Paces:
        """Of kinds of devices, at full load, with so many stages."""
        read_blocks, tokens = self.request.needed_blocks, self.request.step_tokens(sum(counts))
        return cache(partial(pace_of, self._parts[level], read_blocks=read_blocks, tokens=tokens))

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

    def bound(self, choices: Sequence[Choice]) -> Score:
        """No way with one of these choices scores less."""
        bounds = []
        for choice in choices:
            packers = [self.packer(choice.counts, n) for n in range(len(self._ladder))]
            blocks, quality = self.request.needed_blocks, (0, 0)
            if self.request.spare is Spare.QUALITY:
                number = max(
                    n for n, packer in enumerate(packers)
                    if n == 0 or packer.spare_bytes(blocks, self._ladder[n].min_better) >= 0
                )  # fmt: skip
                packer, num_layers = packers[number], len(self.parts.layers)
                step = packer.parts.step
                better = min(num_layers, packer.spare_bytes(blocks, 0) // step) if step else 0
                quality = (-number, -better)
            bounds.append(Score(choice.cost, quality, -packers[0].blocks_bound(0), 0))
        return min(bounds)

    def best(self, choices: list[Choice]) -> Solution:
        """The best way with one of the choices that `cheapest` found."""
        number, better, choices = self._best_quality(choices)
        blocks, choices = self._most_blocks(number, better, choices)
        best_ns, best = None, None
        for choice in choices:
            pace = self.pace(choice.counts, number)
            classes = self.pools.in_question(choice.counts, pace)
            packer = packer_for(self._parts[number], classes, choice.counts)
            slowest = _fastest(packer, blocks, better)
            if best_ns is None or slowest < best_ns:
                best_ns, best = slowest, (choice, pace, packer)
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
            pace=best[1],
            packer=best[2],
            runs=tuple(best[2].pack(blocks, best_ns)),
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
        most = max(packer.blocks_bound(better) for packer in packers.values())

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

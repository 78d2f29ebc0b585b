"""Which devices come into question: how many of each price, cheapest choice first.

A device with more room can stand in for any other: it holds what the other held. So of each price
the roomiest decide whether a choice of so many of each price can hold the model at all; where
speed counts too, only those stay in question of which no sufficient number is at least as roomy
and as fast.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tightfit.cluster.planning.inventory import Device, DeviceType
from tightfit.cluster.planning.layout import DeviceClass
from tightfit.cluster.planning.pace import Pace

Paces = Callable[[DeviceType], Pace]
"""How fast a kind of device is with the model."""


class Objective(StrEnum):
    """What the cost of a plan is."""

    DEVICES = "devices"
    DOLLARS = "dollars"


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A device, and what planning knows of it."""

    device: Device
    room: int
    """Bytes for weights and KV blocks."""
    only: tuple[int, int] | None = None
    """(First layer, one past the last) that the operator pinned to it."""

    @property
    def microdollars(self) -> int:
        """An hour."""
        return round(self.device.price * 1_000_000)


class Choice(NamedTuple):
    """How many devices of each group."""

    cost: tuple[int, int]
    """What is to be least: devices and 0, or microdollars an hour and devices."""
    counts: tuple[int, ...]


class Pools:
    """Candidates in groups of one price; the pinned, all of which are used, each in its own.

    Args:
        candidates: the devices.
        objective: what their cost is.
        max_devices: most to use; None: no limit.
        max_microdollars: most to pay for an hour; None: no limit.
    """

    def __init__(
        self,
        candidates: Sequence[Candidate],
        objective: Objective,
        *,
        max_devices: int | None = None,
        max_microdollars: int | None = None,
    ) -> None:
        self._objective = objective
        self._max_devices, self._max_microdollars = max_devices, max_microdollars
        by_price: dict[int, list[Candidate]] = {}
        # Where prices do not matter, all devices are of one.
        is_priced = objective is Objective.DOLLARS or max_microdollars is not None
        for candidate in candidates:
            if candidate.only is None:
                price = candidate.microdollars if is_priced else 0
                by_price.setdefault(price, []).append(candidate)
        pinned = [candidate for candidate in candidates if candidate.only is not None]
        free = [by_price[price] for price in sorted(by_price)]
        prices = [one.microdollars if is_priced else 0 for one in pinned] + sorted(by_price)
        self.groups = [[one] for one in pinned] + [
            sorted(group, key=lambda one: -one.room) for group in free
        ]
        """Of each, the roomiest first."""
        self._prices, self._num_pinned = prices, len(pinned)

    @property
    def num_devices(self) -> int:
        """Of all groups."""
        return sum(len(group) for group in self.groups)

    def choices(self, layer_bytes: int, num_layers: int) -> Iterator[Choice]:
        """Choices that might hold so many layers of at least so many bytes, cheapest first."""
        holds = [[_most_layers(one, layer_bytes) for one in group] for group in self.groups]
        if not all(group[0] for group in holds[: self._num_pinned]):
            return  # what is pinned to a device has no room there
        if sum(heapq.nlargest(num_layers, (n for group in holds for n in group))) < num_layers:
            return
        base = (1,) * self._num_pinned + (0,) * (len(self.groups) - self._num_pinned)
        # A* over counts; a state is made from one with one device less of its last group.
        heap = [self._entry(base, self._num_pinned, holds, num_layers)]
        heap = heap if self._is_allowed(base, num_layers) else []
        while heap:
            _, missing, cost, counts, last = heapq.heappop(heap)
            if missing <= 0:
                yield Choice(cost, counts)
            for group in range(last, len(counts)):
                more = (*counts[:group], counts[group] + 1, *counts[group + 1 :])
                if counts[group] < len(holds[group]) and self._is_allowed(more, num_layers):
                    heapq.heappush(heap, self._entry(more, group, holds, num_layers))

    def _entry(
        self, counts: tuple[int, ...], last: int, holds: list[list[int]], num_layers: int
    ) -> tuple[tuple[float, ...], int, tuple[int, int], tuple[int, ...], int]:
        """Its key is a lower bound for the cost of it and of all that are made from it."""
        held = sum(sum(group[:n]) for group, n in zip(holds, counts, strict=True))
        missing = max(0, num_layers - held)
        devices = sum(counts)
        dollars = sum(n * price for n, price in zip(counts, self._prices, strict=True))
        is_counted = self._objective is Objective.DEVICES
        cost = (devices, 0) if is_counted else (dollars, devices)
        rates = [
            (1 if is_counted else price) / group[n]
            for group, n, price in list(zip(holds, counts, self._prices, strict=True))[last:]
            if n < len(group) and group[n]
        ]
        bound = cost[0] + (missing * min(rates) if rates else 0) - 1e-6 * bool(missing)
        return (bound, *cost), missing, cost, counts, last

    def _is_allowed(self, counts: tuple[int, ...], num_layers: int) -> bool:
        if sum(counts) > min(num_layers, self._max_devices or num_layers):
            return False
        if self._max_microdollars is None:
            return True
        dollars = sum(n * price for n, price in zip(counts, self._prices, strict=True))
        return dollars <= self._max_microdollars

    def roomiest(self, counts: Sequence[int]) -> list[DeviceClass]:
        """The classes among which so many of each group have most room; speed not told apart."""
        return _classes(
            (group, one.room, None, one.only)
            for group, n in enumerate(counts)
            for one in self.groups[group][:n]
        )

    def in_question(self, counts: Sequence[int], pace: Paces) -> list[DeviceClass]:
        """All classes of which a fastest way with so many of each group may need one."""
        kept: list[DeviceClass] = []
        for group, n in enumerate(counts):
            in_group: list[tuple[DeviceClass, Pace]] = []
            for mine in _classes(
                (group, one.room, pace(one.device.type), one.only) for one in self.groups[group]
            ):  # roomiest first
                assert mine.pace is not None
                better = sum(c.number for c, p in in_group if p.is_no_slower_than(mine.pace))
                if better < n:
                    in_group.append((mine, mine.pace))
            kept += [device_class for device_class, _ in in_group]
        return kept

    def members(self, device_class: DeviceClass, pace: Paces) -> list[Device]:
        """The devices of a class that `in_question` gave."""
        return [
            one.device
            for one in self.groups[device_class.group]
            if one.room == device_class.room and pace(one.device.type) == device_class.pace
        ]


def _most_layers(candidate: Candidate, layer_bytes: int) -> int:
    """Those pinned to it, or none; else as many as it has room for."""
    room = candidate.room // layer_bytes
    if candidate.only is None:
        return room
    pinned = candidate.only[1] - candidate.only[0]
    return pinned if pinned <= room else 0


def _classes(
    found: Iterator[tuple[int, int, Pace | None, tuple[int, int] | None]],
) -> list[DeviceClass]:
    """(group, room, pace, pinned layers) of devices, counted; roomiest and fastest first."""
    counted = Counter(found)
    # A pace that is no slower in anything comes first.
    order = sorted(counted, key=lambda one: (one[0], -one[1], one[2] or ()))
    return [
        DeviceClass(group=group, room=room, number=counted[key], pace=pace, only=only)
        for key in order
        for group, room, pace, only in [key]
    ]

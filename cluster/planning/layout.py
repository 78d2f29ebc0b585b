"""Bytes and times of stages on classes of devices, and what a search for the best way answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tightfit.cluster.planning.memory import Parts
from tightfit.cluster.planning.pace import Pace


class DeviceClass(NamedTuple):
    """Devices that are alike."""

    group: int
    """Of each group a given number of devices is used, of whatever class."""
    room: int
    """Bytes for weights and KV blocks."""
    number: int
    pace: Pace | None = None
    """None where times do not count."""
    only: tuple[int, int] | None = None
    """(First layer, one past the last) that it has to hold; None: any."""


class Run(NamedTuple):
    """The layers of one stage."""

    device_class: int
    """Index."""
    first: int
    end: int
    """One past the last."""
    num_better: int
    """Of them, those in the better format."""


class Packer(ABC):
    """A model's parts and one choice of how many devices of each group are used.

    It is taken for granted that no fewer of them hold the model in the lesser format: planning
    goes from the cheapest choice on.

    Args:
        parts: the model's.
        classes: of devices; with their pace, if times are asked for.
        wanted: devices of each group, each of which holds at least one layer.
    """

    def __init__(self, parts: Parts, classes: Sequence[DeviceClass], wanted: Sequence[int]) -> None:
        self.parts, self.classes, self.wanted = parts, classes, wanted
        self.num_layers, self.num_stages = len(parts.layers), sum(wanted)
        self.up_to = [0, *accumulate(parts.layers)]
        """Bytes of all layers before each."""
        self.ns_up_to = [
            [] if one.pace is None else self._layer_ns(one.pace) for one in self.classes
        ]
        """For each class, nanoseconds in which it reads all layers before each, all of them in the
        lesser format."""
        self.better_ns = [_better_ns(one.pace) for one in self.classes]
        """For each class, what a layer takes longer in the better format; negative where fewer bits
        are slower."""

    # -- what a search answers ---------------------------------------------------------------

    @abstractmethod
    def most_better(self, blocks: int, limit_ns: int | None = None) -> int | None:
        """Most layers in the better format with so many KV blocks on every stage, where each stage
        reads what a step needs within the limit; None: it does not fit at all."""

    def fits(self, blocks: int, num_better: int, limit_ns: int | None = None) -> bool:
        """There is a way with at least so many layers in the better format."""
        most = self.most_better(blocks, limit_ns)
        return most is not None and most >= num_better

    @abstractmethod
    def pack(self, blocks: int, limit_ns: int | None = None) -> list[Run]:
        """The stages, first to last, with most layers in the better format.

        Raises:
            ValueError: it does not fit.
        """

    @abstractmethod
    def furthest(self, blocks: int) -> int:
        """Most layers, from the first on, that the devices hold with so many KV blocks, all layers
        in the lesser format and the last one with the head."""

    # -- bytes and times ---------------------------------------------------------------------

    def _layer_ns(self, pace: Pace) -> list[int]:
        return [0, *accumulate(pace.layers[kind] for kind in self.parts.kind)]

    def stage_ns(self, run: Run) -> int:
        """Nanoseconds in which a stage's device reads what a step needs at full load."""
        lesser = self._lesser_ns(run.device_class, run.first, run.end)
        return lesser + run.num_better * self.better_ns[run.device_class]

    def _lesser_ns(self, device_class: int, first: int, end: int) -> int:
        """With all its layers in the lesser format."""
        up_to, pace = self.ns_up_to[device_class], self.classes[device_class].pace
        head = pace.head if pace is not None and end == self.num_layers else 0
        return up_to[end] - up_to[first] + head

    def spare_blocks(self, run: Run) -> int:
        """KV blocks for which a stage has room."""
        left = self.classes[run.device_class].room - self.weight_bytes(run)
        return left // (self.parts.kv_block * (run.end - run.first))

    def spare_bytes(self, blocks: int, num_better: int) -> int:
        """What would be left of all devices together, if bytes could lie anywhere."""
        parts = self.parts
        total = sum(c.room * c.number for c in self.classes) - sum(parts.layers)
        total -= parts.embedding + min(parts.head, parts.lone_head)
        return total - num_better * parts.step - blocks * parts.kv_block * self.num_layers

    def blocks_bound(self, num_better: int) -> int:
        """KV blocks of which no more fit on every stage."""
        return self.spare_bytes(0, num_better) // (self.parts.kv_block * self.num_layers)

    def weight_bytes(self, run: Run) -> int:
        """What a stage holds, but for KV cache and workspace."""
        return self.held_bytes(run.first, run.end, 0) + run.num_better * self.parts.step

    def read_bytes(self, run: Run) -> int:
        """Of its weights, what a step reads: all but the embedding."""
        head = self.parts.head if run.end == self.num_layers else 0
        weights = self.up_to[run.end] - self.up_to[run.first] + head
        return weights + run.num_better * self.parts.step

    def held_bytes(self, first: int, end: int, blocks: int) -> int:
        """On a stage with all its layers in the lesser format, but for the workspace."""
        parts = self.parts
        total = self.up_to[end] - self.up_to[first] + blocks * parts.kv_block * (end - first)
        if first == 0:
            total += parts.embedding
        if end == self.num_layers:
            total += parts.lone_head if first == 0 else parts.head
        return total

    def most_on_stage(
        self, device_class: int, first: int, end: int, blocks: int, limit_ns: int | None
    ) -> int | None:
        """Most layers in the better format on one stage; None: it does not hold these."""
        device = self.classes[device_class]
        if device.only is not None and device.only != (first, end):
            return None
        left = device.room - self.held_bytes(first, end, blocks)
        if left < 0:
            return None
        most = min(end - first, left // self.parts.step) if self.parts.step else 0
        if limit_ns is None:
            return most
        left_ns = limit_ns - self._lesser_ns(device_class, first, end)
        each_ns = self.better_ns[device_class]
        if each_ns > 0:
            most = min(most, left_ns // each_ns)
        # Where the better format is the faster one, as many as there is room for take least time.
        return most if most >= 0 and most * each_ns <= left_ns else None


def _better_ns(pace: Pace | None) -> int:
    if pace is None or not pace.better:
        return 0
    return pace.better[0] - pace.layers[0]  # two formats go with one kind of layers

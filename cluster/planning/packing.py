"""Lays a model's layers over devices: exact, by dynamic programming over layers × devices used.

Devices that are alike are a class, of which only the number in use matters: a state is how many
devices of each class hold a stage, and how many layers those hold. A stage's layers are contiguous;
the first holds the embedding, the last the head. Every stage gets as many KV blocks as the others.

Where layers may be in one of two formats, a state keeps the most layers in the better one. Where
there is one format only, the furthest layer that a choice of devices can reach is all that matters:
whatever holds a run of layers holds a part of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from tightfit.cluster.planning.memory import Parts


class DeviceClass(NamedTuple):
    """Devices that are alike."""

    group: int
    """Of each group a given number of devices is used, of whatever class."""
    room: int
    """Bytes for weights and KV blocks."""
    gb_per_s: int
    number: int
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


class _Step(NamedTuple):
    """Devices in use become one more."""

    device_class: int
    before: int
    """Index of the state before."""


class Packer:
    """One choice of how many devices of each group are used.

    It is taken for granted that no fewer of them hold the model in the lesser format: planning
    goes from the cheapest choice on.

    Args:
        parts: the model's.
        classes: of devices.
        wanted: devices of each group, each of which holds at least one layer.
        read_blocks: KV blocks that a step reads at full load.
    """

    def __init__(
        self,
        parts: Parts,
        classes: Sequence[DeviceClass],
        wanted: Sequence[int],
        *,
        read_blocks: int,
    ) -> None:
        self.parts, self.classes = parts, classes
        self.num_layers, self.num_stages = len(parts.layers), sum(wanted)
        self._up_to = [0, *accumulate(parts.layers)]
        self._read_kv = read_blocks * parts.kv_block
        self._has_pins = any(c.only is not None for c in classes)
        self._states = list(_states(classes, wanted))
        self._in_use = [sum(state) for state in self._states]
        index = {state: number for number, state in enumerate(self._states)}
        self._steps = [list(_steps(state, index)) for state in self._states]
        self._finals = [n for n, used in enumerate(self._in_use) if used == self.num_stages]

    def most_better(self, blocks: int, limit_ns: int | None = None) -> int | None:
        """Most layers in the better format with so many KV blocks on every stage, where each stage
        reads what a step needs within the limit; None: it does not fit at all."""
        if not self._has_pins and self._reach(blocks, limit_ns) < self.num_layers:
            return None
        if not self._has_pins and not self.parts.step:
            return 0
        tables = self._tables(blocks, limit_ns)
        found = [tables[n][self.num_layers] for n in self._finals if self.num_layers in tables[n]]
        return max(found, default=None)

    def fits(self, blocks: int, num_better: int, limit_ns: int | None = None) -> bool:
        """There is a way with at least so many layers in the better format."""
        if num_better == 0 and not self._has_pins:
            return self._reach(blocks, limit_ns) >= self.num_layers
        most = self.most_better(blocks, limit_ns)
        return most is not None and most >= num_better

    def pack(self, blocks: int, limit_ns: int | None = None) -> list[Run]:
        """The stages, first to last, with most layers in the better format.

        Raises:
            ValueError: it does not fit.
        """
        tables = self._tables(blocks, limit_ns)
        finals = [n for n in self._finals if self.num_layers in tables[n]]
        if not finals:
            raise ValueError("does not fit")
        number = max(finals, key=lambda n: tables[n][self.num_layers])
        end, runs = self.num_layers, []
        while end:
            run, number = self._last_run(tables, number, end, blocks, limit_ns)
            runs.append(run)
            end = run.first
        return runs[::-1]

    def stage_ns(self, run: Run) -> int:
        """Nanoseconds in which a stage's device reads what a step needs at full load."""
        read = self.read_bytes(run) + self._read_kv * (run.end - run.first)
        return -(-read // self.classes[run.device_class].gb_per_s)

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
        return self._held_bytes(run.first, run.end, 0) + run.num_better * self.parts.step

    def read_bytes(self, run: Run) -> int:
        """Of its weights, what a step reads: all but the embedding."""
        head = self.parts.head if run.end == self.num_layers else 0
        weights = self._up_to[run.end] - self._up_to[run.first] + head
        return weights + run.num_better * self.parts.step

    def furthest(self, blocks: int) -> int:
        """One past the furthest layer that the devices reach with so many KV blocks, all layers in
        the lesser format."""
        return self._reach(blocks, None)

    # -- one stage ---------------------------------------------------------------------------

    def _held_bytes(self, first: int, end: int, blocks: int) -> int:
        """On a stage with all its layers in the lesser format, but for the workspace."""
        parts = self.parts
        total = self._up_to[end] - self._up_to[first] + blocks * parts.kv_block * (end - first)
        if first == 0:
            total += parts.embedding
        if end == self.num_layers:
            total += parts.lone_head if first == 0 else parts.head
        return total

    def _read_bytes(self, first: int, end: int) -> int:
        """In a step, by a stage with all its layers in the lesser format."""
        total = self._up_to[end] - self._up_to[first] + self._read_kv * (end - first)
        return total + (self.parts.head if end == self.num_layers else 0)

    def _num_better(
        self, device_class: int, first: int, end: int, blocks: int, limit_ns: int | None
    ) -> int | None:
        """Most layers in the better format on one stage; None: it does not hold these."""
        device = self.classes[device_class]
        if device.only is not None and device.only != (first, end):
            return None
        left = device.room - self._held_bytes(first, end, blocks)
        if limit_ns is not None:
            left = min(left, limit_ns * device.gb_per_s - self._read_bytes(first, end))
        if left < 0:
            return None
        return min(end - first, left // self.parts.step) if self.parts.step else 0

    # -- one format: how far ------------------------------------------------------------------

    def _reach(self, blocks: int, limit_ns: int | None) -> int:
        """One past the furthest layer that any choice of devices reaches."""
        per_layer = blocks * self.parts.kv_block
        held = [up_to + per_layer * k for k, up_to in enumerate(self._up_to)]
        read = [up_to + self._read_kv * k for k, up_to in enumerate(self._up_to)]
        reach = [0] * len(self._states)
        for number, steps in enumerate(self._steps):
            for device_class, before in steps:
                first = reach[before]
                if first == self.num_layers:
                    reach[number] = first
                    continue
                device = self.classes[device_class]
                room = held[first] + device.room - (0 if first else self.parts.embedding)
                end = bisect_right(held, room) - 1
                if limit_ns is not None:
                    end = min(end, bisect_right(read, read[first] + limit_ns * device.gb_per_s) - 1)
                # The last layer comes with the head.
                if end == self.num_layers and not self._holds_end(
                    device_class, first, blocks, limit_ns
                ):
                    end -= 1
                reach[number] = max(reach[number], first, end)
        return max(reach[number] for number in self._finals)

    def _holds_end(self, device_class: int, first: int, blocks: int, limit_ns: int | None) -> bool:
        end = self.num_layers
        return self._num_better(device_class, first, end, blocks, limit_ns) is not None

    # -- two formats: how many in the better ---------------------------------------------------

    def _tables(self, blocks: int, limit_ns: int | None) -> list[dict[int, int]]:
        """For each state: one past its last layer → most layers in the better format."""
        each = blocks * self.parts.kv_block + min(self.parts.layers)
        longest = max((device.room // each for device in self.classes), default=0)
        tables: list[dict[int, int]] = [{} for _ in self._states]
        tables[0][0] = 0
        for number, steps in enumerate(self._steps):
            missing = self.num_stages - self._in_use[number]
            ends = (
                range(self.num_layers, self.num_layers + 1)
                if missing == 0
                else range(max(1, self.num_layers - missing * longest), self.num_layers)
            )
            for device_class, before in steps:
                for first, better in tables[before].items():
                    self._extend(
                        tables[number], device_class, first, better, ends, blocks, limit_ns
                    )
        return tables

    def _extend(
        self,
        table: dict[int, int],
        device_class: int,
        first: int,
        better: int,
        ends: range,
        blocks: int,
        limit_ns: int | None,
    ) -> None:
        """Enter every end that one more stage from `first` on can have."""
        for end in range(max(ends.start, first + 1), ends.stop):
            more = self._num_better(device_class, first, end, blocks, limit_ns)
            if more is None:
                if self.classes[device_class].only is None:
                    return  # nor does it hold any more layers
                continue
            if better + more > table.get(end, -1):
                table[end] = better + more

    def _last_run(
        self,
        tables: list[dict[int, int]],
        number: int,
        end: int,
        blocks: int,
        limit_ns: int | None,
    ) -> tuple[Run, int]:
        """The last stage of the best way to a state, and the state before."""
        best = tables[number][end]
        for device_class, before in self._steps[number]:
            for first, better in tables[before].items():
                if first >= end:
                    continue
                more = self._num_better(device_class, first, end, blocks, limit_ns)
                if more is not None and better + more == best:
                    return Run(device_class, first, end, more), before
        raise AssertionError("every state of the tables has one before it")


def _states(classes: Sequence[DeviceClass], wanted: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """How many devices of each class are in use: every number, fewest devices first."""
    found: list[tuple[int, ...]] = [()]
    for device_class in classes:
        longer = []
        for state in found:
            used = sum(
                n for n, c in zip(state, classes, strict=False) if c.group == device_class.group
            )
            most = min(device_class.number, wanted[device_class.group] - used)
            longer += [(*state, n) for n in range(most + 1)]
        found = longer
    return iter(sorted(found, key=lambda state: (sum(state), state)))


def _steps(state: tuple[int, ...], index: dict[tuple[int, ...], int]) -> Iterator[_Step]:
    for device_class, count in enumerate(state):
        if count:
            before = (*state[:device_class], count - 1, *state[device_class + 1 :])
            yield _Step(device_class, index[before])

"""The best way to lay layers over devices, by dynamic programming over layers × devices in use.

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
from math import prod
from typing import NamedTuple

from tightfit.cluster.planning.layout import DeviceClass, Packer, Run
from tightfit.cluster.planning.memory import Parts


class _Step(NamedTuple):
    """Devices in use become one more."""

    device_class: int
    before: int
    """Index of the state before."""


class ByState(Packer):
    """Whatever the layers are like, and with pinned ones; there may be many states."""

    def __init__(self, parts: Parts, classes: Sequence[DeviceClass], wanted: Sequence[int]) -> None:
        super().__init__(parts, classes, wanted)
        self._pinned = sorted(c.only for c in classes if c.only is not None)
        self._states = list(_states(classes, wanted))
        self._in_use = [sum(state) for state in self._states]
        index = {state: number for number, state in enumerate(self._states)}
        self._steps = [list(_steps(state, index)) for state in self._states]
        self._finals = [n for n, used in enumerate(self._in_use) if used == self.num_stages]
        self._lesser_is_faster = all(more >= 0 for more in self.better_ns)

    def most_better(self, blocks: int, limit_ns: int | None = None) -> int | None:
        limited_ns = limit_ns if self._lesser_is_faster else None
        if not self._pinned and self._reach(blocks, limited_ns) < self.num_layers:
            return None
        if not self._pinned and not self.parts.step:
            return 0
        tables = self._tables(blocks, limit_ns)
        found = [tables[n][self.num_layers] for n in self._finals if self.num_layers in tables[n]]
        return max(found, default=None)

    def fits(self, blocks: int, num_better: int, limit_ns: int | None = None) -> bool:
        is_plain = limit_ns is None or self._lesser_is_faster
        if num_better == 0 and not self._pinned and is_plain:
            return self._reach(blocks, limit_ns) >= self.num_layers
        return super().fits(blocks, num_better, limit_ns)

    def pack(self, blocks: int, limit_ns: int | None = None) -> list[Run]:
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

    def furthest(self, blocks: int) -> int:
        return self._reach(blocks, None)

    # -- one format: how far ------------------------------------------------------------------

    def _reach(self, blocks: int, limit_ns: int | None) -> int:
        """One past the furthest layer that any choice of devices reaches."""
        per_layer = blocks * self.parts.kv_block
        held = [up_to + per_layer * k for k, up_to in enumerate(self.up_to)]
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
                    ns = self.ns_up_to[device_class]
                    end = min(end, bisect_right(ns, ns[first] + limit_ns) - 1)
                # The last layer comes with the head.
                if end == self.num_layers and not self._holds_end(
                    device_class, first, blocks, limit_ns
                ):
                    end -= 1
                reach[number] = max(reach[number], first, end)
        return max(reach[number] for number in self._finals)

    def _holds_end(self, device_class: int, first: int, blocks: int, limit_ns: int | None) -> bool:
        end = self.num_layers
        return self.most_on_stage(device_class, first, end, blocks, limit_ns) is not None

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
        only = self.classes[device_class].only
        stop = ends.stop
        for pinned, _ in self._pinned:
            if pinned >= first and only is None:  # up to there, and another device goes on
                stop = min(stop, pinned + 1)
                break
        if only is not None:
            ends, stop = range(max(ends.start, only[1]), stop), min(stop, only[1] + 1)
        for end in range(max(ends.start, first + 1), stop):
            more = self.most_on_stage(device_class, first, end, blocks, limit_ns)
            if more is None:
                return  # nor does it hold any more layers
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
                more = self.most_on_stage(device_class, first, end, blocks, limit_ns)
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


def num_states(classes: Sequence[DeviceClass], wanted: Sequence[int]) -> int:
    """At most."""
    return prod(1 + min(c.number, wanted[c.group]) for c in classes)

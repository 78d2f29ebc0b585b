"""The best way to lay layers that are all alike over devices that need not be.

Which device holds which of the middle layers does not matter then; only which one has the first,
with the embedding, and which one the last, with the head. So devices are taken one after the other,
each with some layers or none, and a state is: devices of the group in use, whether first and last
have been given away, and layers so far. There are few, however many classes of devices there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tightfit.cluster.planning.layout import DeviceClass, Packer, Run
from tightfit.cluster.planning.memory import Parts


class _Slot(NamedTuple):
    """One device that may be used."""

    device_class: int
    is_last_of_group: bool
    """Of its group, so many devices have to be in use now as are wanted."""


class _State(NamedTuple):
    in_use: int
    """Devices of the slot's group."""
    has_first: bool
    has_last: bool
    layers: int


class _Move(NamedTuple):
    """What one device may hold."""

    is_first: bool
    is_last: bool
    layers: int
    num_better: int


_Table = dict[_State, int]
"""Most layers in the better format, for each state."""
_START = _State(0, False, False, 0)


class Alike(Packer):
    """Layers of one size, none pinned."""

    def __init__(self, parts: Parts, classes: Sequence[DeviceClass], wanted: Sequence[int]) -> None:
        super().__init__(parts, classes, wanted)
        self._slots = list(self._all_slots())

    def most_better(self, blocks: int, limit_ns: int | None = None) -> int | None:
        return self._tables(blocks, limit_ns)[-1].get(self._end)

    def pack(self, blocks: int, limit_ns: int | None = None) -> list[Run]:
        tables = self._tables(blocks, limit_ns)
        if self._end not in tables[-1]:
            raise ValueError("does not fit")
        taken: list[tuple[_Move, int]] = []
        state = self._end
        for number in reversed(range(len(self._slots))):
            slot = self._slots[number]
            best = tables[number + 1][state]
            for before, better in tables[number].items():
                move = self._move_between(slot, before, state, best - better, blocks, limit_ns)
                if move is not None:
                    if move.layers:
                        taken.append((move, slot.device_class))
                    state = before
                    break
        taken.sort(key=lambda one: (one[0].is_last, not one[0].is_first))
        runs: list[Run] = []
        for move, device_class in taken:
            first = runs[-1].end if runs else 0
            runs.append(Run(device_class, first, first + move.layers, move.num_better))
        return runs

    def furthest(self, blocks: int) -> int:
        each = self.parts.layers[0] + blocks * self.parts.kv_block
        gains = [
            (device.room - self.parts.embedding) // each - device.room // each
            for device in self.classes
            if device.room >= self.parts.embedding
        ]
        held = sum(device.room // each * device.number for device in self.classes)
        held += max(gains, default=-held)
        if held < self.num_layers:
            return held
        return self.num_layers if self.fits(blocks, 0) else self.num_layers - 1

    @property
    def _end(self) -> _State:
        return _State(0, True, True, self.num_layers)

    def _all_slots(self) -> Iterator[_Slot]:
        for group, wanted in enumerate(self.wanted):
            slots = [
                number
                for number, device in enumerate(self.classes)
                if device.group == group
                for _ in range(min(device.number, wanted))
            ]
            for place, number in enumerate(slots):
                yield _Slot(number, place == len(slots) - 1)

    def _tables(self, blocks: int, limit_ns: int | None) -> list[_Table]:
        """Before the first slot, and after each."""
        moves = [self._moves(number, blocks, limit_ns) for number in range(len(self.classes))]
        longest = max((move.layers for found in moves for move in found), default=0)
        tables: list[_Table] = [{_START: 0}]
        done = 0  # devices of the groups before
        for place, slot in enumerate(self._slots):
            group = self.classes[slot.device_class].group
            wanted = self.wanted[group]
            rest = sum(
                self.classes[later.device_class].group == group
                for later in self._slots[place + 1 :]
            )
            table: _Table = {}
            for state, better in tables[-1].items():
                if state.in_use + rest >= wanted:
                    self._enter(table, state, better, slot, wanted)
                if state.in_use == wanted:
                    continue
                missing = self.num_stages - done - state.in_use - 1
                least = self.num_layers - missing * longest - state.layers
                most = self.num_layers - missing - state.layers
                for move in moves[slot.device_class]:
                    if not least <= move.layers <= most or not self._agrees(state, move, missing):
                        continue
                    after = _State(
                        state.in_use + 1,
                        state.has_first or move.is_first,
                        state.has_last or move.is_last,
                        state.layers + move.layers,
                    )
                    self._enter(table, after, better + move.num_better, slot, wanted)
            tables.append(table)
            if slot.is_last_of_group:
                done += wanted
        return tables

    def _agrees(self, state: _State, move: _Move, missing: int) -> bool:
        """First and last are given away once, and there are devices left for those that are not."""
        if (state.has_first and move.is_first) or (state.has_last and move.is_last):
            return False
        given = state.has_first + state.has_last + move.is_first + move.is_last
        return missing >= 2 - given

    def _enter(self, table: _Table, state: _State, better: int, slot: _Slot, wanted: int) -> None:
        if slot.is_last_of_group:
            if state.in_use != wanted:
                return
            state = state._replace(in_use=0)
        if better > table.get(state, -1):
            table[state] = better

    def _moves(self, device_class: int, blocks: int, limit_ns: int | None) -> list[_Move]:
        """What a device of a class may hold, but for nothing."""
        num_layers, found = self.num_layers, []
        if self.num_stages == 1:
            better = self.most_on_stage(device_class, 0, num_layers, blocks, limit_ns)
            return [] if better is None else [_Move(True, True, num_layers, better)]
        for is_first, is_last in ((False, False), (True, False), (False, True)):
            for layers in range(1, num_layers):
                first = 0 if is_first else num_layers - layers if is_last else 1
                if not is_first and not is_last and layers > num_layers - 2:
                    break
                better = self.most_on_stage(device_class, first, first + layers, blocks, limit_ns)
                if better is None:
                    break
                found.append(_Move(is_first, is_last, layers, better))
        return found

    def _move_between(
        self,
        slot: _Slot,
        before: _State,
        after: _State,
        num_better: int,
        blocks: int,
        limit_ns: int | None,
    ) -> _Move | None:
        """The one that leads from state to state over a slot, if there is one."""
        group = self.classes[slot.device_class].group
        in_use = self.wanted[group] if slot.is_last_of_group else after.in_use
        wanted = after._replace(in_use=in_use)
        if before == wanted and num_better == 0:
            return _Move(False, False, 0, 0)
        if before.in_use + 1 != in_use:
            return None
        for move in self._moves(slot.device_class, blocks, limit_ns):
            reached = _State(
                in_use,
                before.has_first or move.is_first,
                before.has_last or move.is_last,
                before.layers + move.layers,
            )
            once = not (before.has_first and move.is_first) and not (
                before.has_last and move.is_last
            )
            if once and reached == wanted and move.num_better == num_better:
                return move
        return None

"""The best mix of formats for a number of bytes: a multiple-choice knapsack, solved exactly.

Of every unit one option is to be taken, so that the bytes of all stay within a budget and the sum
of their losses is least. With a price λ on bytes each unit decides by itself, and the sum of the
least (loss + λ · bytes), less λ · budget, is a lower bound for any mix within the budget. λ is
taken where a greedy mix, which upgrades units in the order of loss saved per byte, runs out of
budget. The gap between that mix and the bound leaves few options whose reduced cost (what they are
dearer than their unit's best at that price) fits in it; those are tried by dynamic programming over
(bytes, loss) pairs, of which no pair is kept that another beats in both. The result is as good as
any, whatever the numbers, up to the rounding of sums; the same input gives the same mix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from tightfit.cluster.errors import PlacementError
from tightfit.kernels.formats import Format
from tightfit.workers.model_formats import Role
from tightfit.workers.sensitivity import MIX_FORMATS, FormatMix, Sensitivities, UnitSensitivity

SLACK = 1e-9
"""Of a gap, by which rounded sums may miss it."""


class Choice(NamedTuple):
    """One way to store one unit."""

    bytes: int
    loss: float


def best_choices(units: Sequence[Sequence[Choice]], budget_bytes: int) -> tuple[int, ...]:
    """Which choice of each unit makes the summed loss least.

    Args:
        units: the choices of each, at least one; losses finite.
        budget_bytes: most bytes of all units together.
    Returns:
        indices into each unit's choices.
    Raises:
        ValueError: not even the smallest choices fit.
    """
    least = sum(min(choice.bytes for choice in unit) for unit in units)
    if least > budget_bytes:
        raise ValueError(f"the smallest choices take {least} bytes, the budget is {budget_bytes}")
    return _Knapsack(units, budget_bytes).solve()


class _Step(NamedTuple):
    """From one choice of a unit to the next on its lower convex hull."""

    saved_per_byte: float
    unit: int
    choice: int


_Path = tuple[int, "_Path"] | None


class _State(NamedTuple):
    """Some units decided."""

    bytes: int
    loss: float
    reduced: float
    """Loss + λ · bytes, above the units' least."""
    path: _Path
    """The last unit's choice, and what was before."""


class _Knapsack:
    def __init__(self, units: Sequence[Sequence[Choice]], budget_bytes: int) -> None:
        self._units, self._budget = units, budget_bytes
        self._hulls = [_hull(unit) for unit in units]

    def solve(self) -> tuple[int, ...]:
        greedy, price = self._greedy()
        if price is None:  # everything has its best choice
            return greedy
        gap = self._loss(greedy) - self._bound(price)
        found = self._improve(price, gap * (1 + SLACK) + SLACK * abs(self._loss(greedy)))
        if found is None or self._loss(found) >= self._loss(greedy):
            return greedy
        return found

    def _loss(self, picked: Sequence[int]) -> float:
        return sum(unit[index].loss for unit, index in zip(self._units, picked, strict=True))

    def _steps(self) -> Iterator[_Step]:
        for number, (unit, hull) in enumerate(zip(self._units, self._hulls, strict=True)):
            for before, after in pairwise(hull):
                saved = unit[before].loss - unit[after].loss
                yield _Step(saved / (unit[after].bytes - unit[before].bytes), number, after)

    def _greedy(self) -> tuple[tuple[int, ...], float | None]:
        """A mix within the budget, and the price of a byte where the budget ran out."""
        picked = [hull[0] for hull in self._hulls]
        left = self._budget - sum(
            unit[index].bytes for unit, index in zip(self._units, picked, strict=True)
        )
        price, stopped = None, set()
        for step in sorted(self._steps(), key=lambda step: -step.saved_per_byte):
            unit = self._units[step.unit]
            more = unit[step.choice].bytes - unit[picked[step.unit]].bytes
            if step.unit in stopped or more > left:
                price = step.saved_per_byte if price is None else price
                stopped.add(step.unit)
                continue
            picked[step.unit] = step.choice
            left -= more
        return tuple(picked), price

    def _bound(self, price: float) -> float:
        least = sum(min(_priced(choice, price) for choice in unit) for unit in self._units)
        return least - price * self._budget

    def _improve(self, price: float, gap: float) -> tuple[int, ...] | None:
        """The best mix whose reduced cost is within the gap."""
        options = [_within(unit, price, gap) for unit in self._units]
        # Units that are as good as decided come first: they add no states.
        order = sorted(range(len(options)), key=lambda i: len(options[i]))
        rest = sum(min(self._units[i][j].bytes for j, _ in options[i]) for i in order)
        states = [_State(0, 0.0, 0.0, None)]
        for i in order:
            rest -= min(self._units[i][j].bytes for j, _ in options[i])
            states = self._extended(states, i, options[i], gap, self._budget - rest)
        if not states:
            return None
        found = [0] * len(order)
        path = min(states, key=lambda state: state.loss).path
        for i in reversed(order):
            assert path is not None
            found[i], path = path
        return tuple(found)

    def _extended(
        self,
        states: list[_State],
        i: int,
        options: Sequence[tuple[int, float]],
        gap: float,
        room: int,
    ) -> list[_State]:
        """The states with one more unit decided that may still become the best."""
        unit = self._units[i]
        longer = [
            _State(size, state.loss + unit[j].loss, state.reduced + reduced, (j, state.path))
            for j, reduced in options
            for state in states
            if state.reduced + reduced <= gap and (size := state.bytes + unit[j].bytes) <= room
        ]
        longer.sort(key=lambda state: (state.bytes, state.loss))
        kept: list[_State] = []
        for state in longer:
            if not kept or state.loss < kept[-1].loss:
                kept.append(state)
        return kept


def _priced(choice: Choice, price: float) -> float:
    return choice.loss + price * choice.bytes


def _within(unit: Sequence[Choice], price: float, gap: float) -> list[tuple[int, float]]:
    """The choices whose reduced cost is within the gap, with it."""
    least = min(_priced(choice, price) for choice in unit)
    reduced = ((j, _priced(choice, price) - least) for j, choice in enumerate(unit))
    return [(j, cost) for j, cost in reduced if cost <= gap]


def _hull(unit: Sequence[Choice]) -> list[int]:
    """The choices on the lower convex hull, bytes rising and loss falling."""
    hull: list[int] = []
    for j in sorted(range(len(unit)), key=lambda j: unit[j]):
        if hull and unit[j].loss >= unit[hull[-1]].loss:
            continue
        while len(hull) > 1 and not _is_convex(unit[hull[-2]], unit[hull[-1]], unit[j]):
            hull.pop()
        hull.append(j)
    return hull


def _is_convex(first: Choice, middle: Choice, last: Choice) -> bool:
    return (first.loss - middle.loss) * (last.bytes - middle.bytes) > (middle.loss - last.loss) * (
        middle.bytes - first.bytes
    )


# -- formats ---------------------------------------------------------------------------------


def mix_for_bits(sensitivities: Sensitivities, bits: float) -> FormatMix:
    """The mix of formats with the least summed loss increase.

    Measured numbers are noisy: where a format is measured to lose less than one of more bits, or
    less than nothing, it counts as losing the same, so that fewer bits are never the better ones.

    Args:
        sensitivities: measured.
        bits: most per weight of the blocks' linear layers, as stages hold them: scales and zero
            points count, biases do not.
    Raises:
        PlacementError: the smallest formats take more.
    """
    budget = int(bits * sensitivities.num_weights / 8)
    units = [_choices(unit) for unit in sensitivities.units]
    least = 8 * sum(unit[0].bytes for unit in units) / sensitivities.num_weights
    if least > bits:
        raise PlacementError(
            f"{bits:g} bits per weight are too few: {MIX_FORMATS[0]} alone takes {least:.3f}, "
            f"scales and zero points included. Allow {least:.3f}, or measure with larger groups"
        )
    picked = iter(best_choices(units, budget))
    layers: list[dict[Role, Format]] = [{} for _ in range(sensitivities.num_layers)]
    for unit, index in zip(sensitivities.units, picked, strict=True):
        layers[unit.layer][unit.role] = MIX_FORMATS[index]
    return tuple(layers)


def mix_loss(sensitivities: Sensitivities, mix: FormatMix) -> float:
    """What a mix loses in all, as `mix_for_bits` counts it, in nats."""
    return sum(
        _choices(unit)[MIX_FORMATS.index(mix[unit.layer][unit.role])].loss
        for unit in sensitivities.units
    )


def _choices(unit: UnitSensitivity) -> list[Choice]:
    """In the order of `MIX_FORMATS`, losses made to rise as bits fall."""
    choices: list[Choice] = []
    loss = 0.0
    for fmt in reversed(MIX_FORMATS):
        loss = max(loss, unit.formats[fmt].loss_increase)
        choices.append(Choice(unit.formats[fmt].bytes, loss))
    return choices[::-1]

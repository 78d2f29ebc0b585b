"""Splits a model's layers among stages so that the fullest stage holds as little as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.units import format_bytes


def split_layers(
    layer_bytes: Sequence[int],
    embedding_bytes: int,
    head_bytes: int,
    num_stages: int,
    budgets: Sequence[int] | None = None,
) -> list[tuple[int, int]]:
    """Contiguous layer ranges, one per stage, that minimise the greatest stage's bytes.

    Exact, by dynamic programming over (stages, layers done) in O(stages × layers²). Of several best
    splits the one whose early stages hold fewest layers is taken, so the answer is deterministic.

    Args:
        layer_bytes: bytes of each layer, in order.
        embedding_bytes: added to the first stage.
        head_bytes: added to the last stage.
        num_stages: how many ranges, each with at least one layer.
        budgets: most bytes on each stage, first to last; None: no limit.

    Returns:
        One (first layer, one past the last) per stage.

    Raises:
        PlacementError: fewer layers than stages, or no split fits the budgets; then it names the
            stage that lacks most in the split that lacks least, and what would help.
    """
    num_layers = len(layer_bytes)
    if num_stages < 1:
        raise PlacementError(f"{num_stages} stages were asked for; there must be at least 1")
    if num_stages > num_layers:
        raise PlacementError(
            f"{num_stages} stages were asked for, but the model has {num_layers} layers and every "
            f"stage holds at least one. Ask for at most {num_layers} stages"
        )
    if budgets is not None and len(budgets) != num_stages:
        raise ValueError(f"{len(budgets)} budgets for {num_stages} stages")
    totals = _Totals(layer_bytes, embedding_bytes, head_bytes)
    if budgets is None:
        return _best(totals, num_stages, [0] * num_stages)
    fitting = _best(totals, num_stages, [0] * num_stages, limits=budgets)
    if not fitting:
        raise PlacementError(_explain(totals, num_stages, budgets))
    return fitting


class _Totals:
    """Bytes of any run of layers, the embedding before the first and the head after the last."""

    def __init__(self, layer_bytes: Sequence[int], embedding_bytes: int, head_bytes: int) -> None:
        self.num_layers = len(layer_bytes)
        self._up_to = [0, *accumulate(layer_bytes)]
        self._embedding = embedding_bytes
        self._head = head_bytes

    def of(self, first: int, end: int) -> int:
        total = self._up_to[end] - self._up_to[first]
        if first == 0:
            total += self._embedding
        if end == self.num_layers:
            total += self._head
        return total


def _best(
    totals: _Totals, num_stages: int, offsets: Sequence[int], limits: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """The split with the least greatest (bytes − offset); empty when none keeps the limits."""
    num_layers = totals.num_layers
    # least[end]: least greatest cost of layers 0..end on the stages so far; cut[stage][end]: where
    # the stage begins in that split.
    least: list[int | None] = [0] + [None] * num_layers
    cuts: list[list[int]] = []
    for stage in range(num_stages):
        best: list[int | None] = [None] * (num_layers + 1)
        cut = [0] * (num_layers + 1)
        for end in range(stage + 1, num_layers - (num_stages - stage - 1) + 1):
            for first in range(stage, end):
                before = least[first]
                size = totals.of(first, end)
                if before is None or (limits is not None and size > limits[stage]):
                    continue
                cost = size - offsets[stage]
                greatest = cost if stage == 0 else max(before, cost)
                current = best[end]
                if current is None or greatest < current:
                    best[end], cut[end] = greatest, first
        least = best
        cuts.append(cut)
    if least[num_layers] is None:
        return []
    bounds = [num_layers]
    for cut in reversed(cuts):
        bounds.append(cut[bounds[-1]])
    return list(pairwise(reversed(bounds)))


def _explain(totals: _Totals, num_stages: int, budgets: Sequence[int]) -> str:
    """What binds first, and what would make it fit."""
    closest = _best(totals, num_stages, budgets)
    lacks = [
        totals.of(first, end) - budget
        for (first, end), budget in zip(closest, budgets, strict=True)
    ]
    stage = max(range(num_stages), key=lambda index: lacks[index])
    first, end = closest[stage]
    parts = [f"layers {first}-{end - 1}" if end - first > 1 else f"layer {first}"]
    parts += ["the embedding"] if first == 0 else []
    parts += ["the LM head"] if end == totals.num_layers else []
    what = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    need, budget = format_bytes(totals.of(first, end)), format_bytes(budgets[stage])
    return (
        f"the model does not fit on {num_stages} stage(s): stage {stage} ({what}) needs {need}, "
        f"its budget is {budget}: it lacks {format_bytes(lacks[stage])}. "
        f"{_remedy(totals, min(budgets), lacks[stage])}"
    )


def _remedy(totals: _Totals, room: int, lack: int) -> str:
    enough, each = _stages_needed(totals, room), f"stages of {format_bytes(room)} would do"
    more = f"{format_bytes(lack)} more"
    if enough is None:
        return f"No number of {each}: give each stage {more}, or choose a smaller format"
    return f"{enough} {each}, or {more} for each stage, or a smaller format"


def _stages_needed(totals: _Totals, room: int) -> int | None:
    """Fewest stages of `room` bytes each, filled one after the other; None: a layer is too big."""
    count, first = 1, 0
    for end in range(1, totals.num_layers + 1):
        if totals.of(end - 1, end) > room:
            return None
        if totals.of(first, end) > room:
            count, first = count + 1, end - 1
    return count

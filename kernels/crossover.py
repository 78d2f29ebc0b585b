"""From how many tokens on the many-token op is the faster one. T tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

NEVER: Final = 2**62
"""A crossover that no number of tokens reaches."""

CANDIDATES: Final = (2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Numbers of tokens tried, in this order. One token always takes the few-token op."""

CONFIRMATIONS: Final = 2
"""Candidates in a row at which the many-token op must win: one can be noise."""

MEASURE_LIMIT_S: Final = 0.3
"""Seconds one measurement may take, about; it is looked at between candidates."""

REPEATS: Final = 7
SAMPLE_LIMIT_S: Final = 0.02
"""Slow ops are repeated less: as often as fits this, at least once after the warm-up."""
WARM_AFTER_S: Final = 0.25
"""Of an op that takes longer the warm-up counts: what is cold at first is nothing beside it, and a
layer of a 175B model takes seconds."""

Run = Callable[[int], object]
"""Computes the op once for T tokens."""


def find_crossover(
    few: Run,
    many: Run,
    *,
    limit_s: float = MEASURE_LIMIT_S,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Smallest number of tokens at which `many` is faster, and is so at the next one tried too.

    When the time runs out first, the crossover is extrapolated: few-token ops do work in proportion
    to the tokens, many-token ops hardly more than before.

    Args:
        few: op for few tokens.
        many: op for many tokens.
        limit_s: time after which no further candidate is tried.
        clock: seconds; for tests.
    Returns:
        A number of tokens, or `NEVER` when `few` won throughout.
    """
    deadline = clock() + limit_s
    crossover, wins = NEVER, 0
    for tokens in CANDIDATES:
        few_s, many_s = _time_both(few, many, tokens, clock)
        if many_s < few_s:
            crossover, wins = min(crossover, tokens), wins + 1
        else:
            crossover, wins = NEVER, 0
        if wins == CONFIRMATIONS:
            break
        if clock() > deadline:
            if crossover == NEVER and few_s > 0:
                crossover = math.ceil(tokens * many_s / few_s)
            break
    return crossover


def _time_both(few: Run, many: Run, tokens: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Best times of both ops in seconds, taken in turn so that both meet the same disturbances."""
    warm_ups = _seconds(few, tokens, clock), _seconds(many, tokens, clock)
    if max(warm_ups) > WARM_AFTER_S:
        return warm_ups
    best = [math.inf, math.inf]
    stop = clock() + SAMPLE_LIMIT_S
    for repeat in range(REPEATS):
        if repeat and clock() > stop:
            break
        for i, op in enumerate((few, many)):
            best[i] = min(best[i], _seconds(op, tokens, clock))
    return best[0], best[1]


def _seconds(op: Run, tokens: int, clock: Callable[[], float]) -> float:
    started = clock()
    op(tokens)
    return clock() - started

"""How fast kinds of devices and the links between them are, where that was measured.

A linear layer's time depends on its format and on how many tokens there are. The probe times some
numbers of tokens; in between, seconds are on a straight line, and from the last two on along it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from tightfit.cluster.settings import Option

Curve = tuple[tuple[int, float], ...]
"""(Tokens, seconds), tokens ascending; at least one."""


def at(curve: Curve, tokens: int) -> float:
    """Seconds at a number of tokens; one measurement alone stands for all numbers."""
    place = bisect_left(curve, (tokens,))
    if place == 0 or len(curve) == 1:
        return curve[0][1]
    (low, fast), (high, slow) = curve[place - 1 : place + 1] if place < len(curve) else curve[-2:]
    slope = (slow - fast) / (high - low)
    if place == len(curve):  # no faster for more tokens than were measured, whatever the noise
        return slow + max(0.0, slope) * (tokens - high)
    return fast + slope * (tokens - low)


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured of linear layers on one kind of device; empty: nothing."""

    by_format: tuple[tuple[str, Curve], ...] = ()
    """Format → seconds for a GB of its weights (values, scales, zero points), by tokens."""

    def covers(self, formats: Set[str]) -> bool:
        """All these formats were measured."""
        return formats <= {name for name, _ in self.by_format}

    def curve(self, reads: Mapping[str, int]) -> Curve:
        """Seconds for so many bytes of some formats, all of which were measured, by tokens."""
        used = {name: curve for name, curve in self.by_format if name in reads}
        measured = sorted({tokens for curve in used.values() for tokens, _ in curve})
        return tuple(
            (tokens, sum(at(used[name], tokens) * size / 1e9 for name, size in reads.items()))
            for tokens in measured
        )


NO_RATES = Rates()


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The way of a micro-batch from one stage to the next, both of their processes included."""

    latency_us: Annotated[
        float, Option("Microseconds until an empty message is there.", at_least=0, at_most=1e7)
    ] = 0.0
    gb_per_s: Annotated[
        float | None,
        Option("Bandwidth, in GB/s; default: without limit.", at_least=1e-6, at_most=1e6),
    ] = None

    def seconds(self, num_bytes: int) -> float:
        """Until so many bytes are there."""
        rest = 0.0 if self.gb_per_s is None else num_bytes / (self.gb_per_s * 1e9)
        return self.latency_us / 1e6 + rest


def dump_curve(curve: Curve) -> str:
    """As a plan's file has it: "1:12.5 64:80.25", tokens and milliseconds."""
    return " ".join(f"{tokens}:{1000 * seconds:.6g}" for tokens, seconds in curve)


@lru_cache(maxsize=4096)
def parse_curve(text: str) -> Curve:
    """What `dump_curve` wrote.

    Raises:
        ValueError: it is of another form, or tokens are not ascending.
    """
    try:
        pairs = [word.split(":") for word in text.split()]
        found = tuple((int(tokens), float(ms) / 1000) for tokens, ms in pairs)
    except ValueError:
        found = ()
    tokens = [point[0] for point in found]
    is_sound = all(n >= 1 and 0 <= seconds < float("inf") for n, seconds in found)
    if not found or not is_sound or sorted(set(tokens)) != tokens:
        raise ValueError(f"{text!r} is not like '1:12.5 64:80.25', tokens and milliseconds")
    return found

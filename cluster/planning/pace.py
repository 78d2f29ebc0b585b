"""How long devices take to read what a step needs: what the slowest stage is chosen by."""

from __future__ import annotations

import math
from typing import NamedTuple

from tightfit.cluster.planning.inventory import DeviceType
from tightfit.cluster.planning.memory import Parts, Reads
from tightfit.cluster.planning.rates import at


class Pace(NamedTuple):
    """Nanoseconds in which one kind of device reads parts of a model, for a step at full load."""

    layers: tuple[int, ...]
    """Each of `Parts.kinds`, with its keys and values."""
    better: tuple[int, ...]
    """The same in the better format, where there are two."""
    head: int

    def is_no_slower_than(self, other: Pace) -> bool:
        """In nothing, so that it can stand in for the other."""
        mine, theirs = ((*one.layers, *one.better, one.head) for one in (self, other))
        return all(a <= b for a, b in zip(mine, theirs, strict=True))


def pace_of(parts: Parts, device: DeviceType, *, read_blocks: int, tokens: int) -> Pace:
    """The pace of a kind of device.

    By the rates that were measured on it, if they are there for all formats of the model; else by
    its bandwidth.

    Args:
        parts: the model's.
        device: the kind.
        read_blocks: KV blocks of all sequences, which one round of the pipeline reads.
        tokens: of a micro-batch, one of each of its sequences.
    """
    kv = -(-read_blocks * parts.kv_block // device.gb_per_s)
    every = (*parts.kinds, *parts.better_kinds, parts.head_reads)
    is_measured = device.rates.covers({name for reads in every for name, _ in reads.linears})

    def read_ns(reads: Reads) -> int:
        if not is_measured:
            return -(-reads.total // device.gb_per_s)
        rest = -(-reads.other // device.gb_per_s)
        return rest + math.ceil(1e9 * at(device.rates.curve(dict(reads.linears)), tokens))

    return Pace(
        layers=tuple(read_ns(reads) + kv for reads in parts.kinds),
        better=tuple(read_ns(reads) + kv for reads in parts.better_kinds),
        head=read_ns(parts.head_reads),
    )

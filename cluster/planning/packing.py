"""Lays a model's layers over the devices of one choice: which search is the right one."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.cluster.planning.alike import Alike
from tightfit.cluster.planning.by_state import ByState, num_states
from tightfit.cluster.planning.layout import DeviceClass, Packer
from tightfit.cluster.planning.memory import Parts

MANY_STATES = 100
"""Of devices in use, from which on layers that are alike are laid without telling the states
apart. Both ways find the same."""


def packer_for(parts: Parts, classes: Sequence[DeviceClass], wanted: Sequence[int]) -> Packer:
    """A search for the best way.

    Args:
        parts: the model's.
        classes: of devices; with their pace, if times are asked for.
        wanted: devices of each group, each of which holds at least one layer.
    """
    are_alike = len(set(parts.layers)) == 1 and all(c.only is None for c in classes)
    is_large = num_states(classes, wanted) > MANY_STATES
    search = Alike if are_alike and is_large else ByState
    return search(parts, classes, wanted)

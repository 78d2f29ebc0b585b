"""What a node is asked to measure of itself, in a process of its own there. Knows no Ray; torch is
imported only where it is needed."""

from __future__ import annotations

from dataclasses import replace

from tightfit.workers.model_formats import AUTO
from tightfit.workers.probing.cache import ProbeCache, cache_directory
from tightfit.workers.probing.present import present_devices
from tightfit.workers.probing.result import NodeProbe, PresentDevice


def probe_this_node(name: str, device: str) -> NodeProbe:
    """`probe_node`, the node being called as the cluster calls it.

    Args:
        name: of the node.
        device: "cpu", "cuda", or "auto": both, where there are GPUs.

    Raises:
        ProbeError: see there.
    """
    from tightfit.workers.probe import probe_node

    return replace(
        probe_node("all" if device == AUTO else device, ProbeCache(cache_directory())), node=name
    )


def present_on_this_node(kinds: frozenset[str], held: frozenset[str]) -> tuple[PresentDevice, ...]:
    """See `present_devices`."""
    return present_devices(kinds, held)

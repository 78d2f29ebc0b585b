"""The nodes of the Ray cluster that we are connected to: what they are called, and what their
devices are, measured where they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tightfit.cluster.errors import PlacementError
from tightfit.workers.errors import WorkerError
from tightfit.workers.node_tasks import present_on_this_node, probe_this_node
from tightfit.workers.probing.result import NodeProbe, PresentDevice

NODE_LABEL = "tightfit.io/node"
"""Label of a Ray node (`ray start --labels tightfit.io/node=NAME`) that plans call it by."""
PROBE_TIMEOUT_S = 180.0
"""Of all nodes together: the first time, kernels are compiled on each GPU."""
LOOK_TIMEOUT_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is alive."""

    name: str
    """Its label `NODE_LABEL`, or its host's name."""
    ray_id: str
    cpus: int
    """That Ray may give out on it."""
    gpus: int

    def may_hold(self, kind: str) -> bool:
        """Ray would start stages on its devices of this kind ("cpu", "gpu")."""
        return self.cpus > 0 and (kind == "cpu" or self.gpus > 0)


def alive_nodes() -> list[Node]:
    """The cluster's nodes, by name.

    Raises:
        PlacementError: two have one name, so that a plan could not tell them apart.
    """
    found = [
        Node(
            name=node.get("Labels", {}).get(NODE_LABEL) or node["NodeManagerHostname"],
            ray_id=node["NodeID"],
            cpus=int(node["Resources"].get("CPU", 0)),
            gpus=int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    useful = [node for node in found if node.cpus > 0]
    twice = [name for name, count in Counter(n.name for n in useful).items() if count > 1]
    if twice:
        raise PlacementError(
            f"several nodes of the Ray cluster are called {twice[0]}, so that a plan cannot tell "
            f"them apart. Start each with `ray start --labels {NODE_LABEL}=NAME`, or give --stages"
        )
    return sorted(useful, key=lambda node: node.name)


def probe_nodes(nodes: Sequence[Node], devices: str) -> list[NodeProbe]:
    """What each node measures of itself, all at the same time; rates are cached on each.

    Args:
        nodes: to ask.
        devices: see `workers.probe.probe_node`.

    Raises:
        PlacementError: a node did not answer, or cannot measure.
    """
    return _everywhere(
        nodes, lambda node: _on(node, probe_this_node).remote(node.name, devices), PROBE_TIMEOUT_S
    )


def look_at_nodes(
    nodes: Sequence[Node], kinds: frozenset[str], held: frozenset[str] = frozenset()
) -> dict[str, tuple[PresentDevice, ...]]:
    """What is there now on each node, by its name; see `present_devices`.

    Raises:
        PlacementError: a node did not answer.
    """
    found = _everywhere(
        nodes, lambda node: _on(node, present_on_this_node).remote(kinds, held), LOOK_TIMEOUT_S
    )
    return {node.name: devices for node, devices in zip(nodes, found, strict=True)}


def _on(node: Node, function: Callable[..., T]) -> Any:
    """The function as a task on this very node, in a process of its own that ends with it, and
    with it its hold on GPUs. Ray would hide these from a task that reserves none."""
    environment = {
        "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        "PYTHONSAFEPATH": "1",
    }
    if "XDG_CACHE_HOME" in os.environ:
        environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    return ray.remote(max_calls=1)(function).options(
        num_cpus=0,
        max_retries=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
        runtime_env={"env_vars": environment},
    )


def _everywhere(nodes: Sequence[Node], start: Callable[[Node], Any], timeout_s: float) -> list[Any]:
    refs = [start(node) for node in nodes]
    _, pending = ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
    for ref in pending:
        ray.cancel(ref, force=True)
    if pending:
        late = ", ".join(node.name for node, ref in zip(nodes, refs, strict=True) if ref in pending)
        raise PlacementError(f"node(s) {late} did not say what they have within {timeout_s:g} s")
    return [_answer(node, ref) for node, ref in zip(nodes, refs, strict=True)]


def _answer(node: Node, ref: Any) -> Any:
    try:
        return ray.get(ref, timeout=LOOK_TIMEOUT_S)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        reason = str(cause) if isinstance(cause, WorkerError) else repr(cause)
        raise PlacementError(f"node {node.name} cannot measure its devices: {reason}") from error
    except ray.exceptions.RayError as error:
        reason = str(error).partition("\n")[0]
        raise PlacementError(f"node {node.name} was lost while it measured: {reason}") from error

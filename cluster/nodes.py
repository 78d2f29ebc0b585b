"""The nodes of the Ray cluster that we are connected to: what they are called, and what their
devices are, measured where they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any, TypeVar

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tightfit.cluster.errors import PlacementError
from tightfit.workers.errors import WorkerError
from tightfit.workers.node_tasks import present_on_this_node, probe_this_node
from tightfit.workers.probing.loopback import LinkEnd
from tightfit.workers.probing.result import LinkRate, NodeProbe, PresentDevice

NODE_LABEL = "tightfit.io/node"
"""Label of a Ray node (`ray start --labels tightfit.io/node=NAME`) that plans call it by."""
PROBE_TIMEOUT_S = 180.0
"""Of all nodes together: the first time, kernels are compiled on each GPU."""
LOOK_TIMEOUT_S = 60.0
MAX_LINKS = 8
"""That are measured: each takes about a second."""
T = TypeVar("T")
KINDS = {"cpu": "cpu", "cuda": "gpu"}
"""Of devices, by what a user calls them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node that is alive."""

    name: str
    """Its label `NODE_LABEL`, or its host's name."""
    ray_id: str
    address: str
    """Of its host."""
    cpus: int
    """That Ray gives out on it."""
    gpus: int
    free_cpus: int
    """That nothing holds now."""
    free_gpus: int

    def may_hold(self, kind: str) -> bool:
        """Ray starts stages on its devices of this kind ("cpu", "gpu")."""
        return self.cpus > 0 and (kind == "cpu" or self.gpus > 0)

    def has_room(self, kind: str) -> bool:
        """Ray would start a stage on one of its devices of this kind now."""
        return self.free_cpus > 0 and (kind == "cpu" or self.free_gpus > 0)

    @property
    def is_idle(self) -> bool:
        """Nothing holds any of its devices."""
        return (self.free_cpus, self.free_gpus) == (self.cpus, self.gpus)


def alive_nodes() -> list[Node]:
    """The cluster's nodes, by name.

    Raises:
        PlacementError: two have one name, so that a plan could not tell them apart.
    """
    free = available_resources_per_node()
    found = [
        _node(node, free.get(node["NodeID"], node["Resources"]))  # a node is known before its room
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


def _node(node: Mapping[str, Any], free: Mapping[str, float]) -> Node:
    return Node(
        name=node.get("Labels", {}).get(NODE_LABEL) or node["NodeManagerHostname"],
        ray_id=node["NodeID"],
        address=node["NodeManagerAddress"],
        cpus=int(node["Resources"].get("CPU", 0)),
        gpus=int(node["Resources"].get("GPU", 0)),
        free_cpus=int(free.get("CPU", 0)),
        free_gpus=int(free.get("GPU", 0)),
    )


def measure_nodes(nodes: Sequence[Node], device: str) -> tuple[list[NodeProbe], LinkRate | None]:
    """What each node that has room measures of itself, and the slowest link between them.

    Args:
        nodes: of the cluster.
        device: "cpu", "cuda", or "auto": GPUs where some node has any.

    Raises:
        PlacementError: no node has room; see `probe_nodes` and `slowest_link`.
    """
    kind = KINDS.get(device) or ("gpu" if any(n.may_hold("gpu") for n in nodes) else "cpu")
    roomy = [node for node in nodes if node.has_room(kind)]
    if not roomy:
        raise PlacementError(_why_no_room(nodes, kind))
    return probe_nodes(roomy, device if kind == "gpu" else "cpu"), slowest_link(roomy)


def _why_no_room(nodes: Sequence[Node], kind: str) -> str:
    what = "GPU" if kind == "gpu" else "CPU"
    if not any(node.may_hold(kind) for node in nodes):
        names = ", ".join(node.name for node in nodes) or "it has none at all"
        return f"no node of the Ray cluster has a {what} to give out ({names}): start one that has"
    free = "; ".join(f"{node.name}: {_free(node, kind)}" for node in nodes)
    return (
        f"every node of the Ray cluster that has a {what} is held by other services; free are "
        f"{free}. Add a node, or end what holds them"
    )


def _free(node: Node, kind: str) -> str:
    cpus = f"{node.free_cpus} of {node.cpus} CPUs"
    return cpus if kind == "cpu" else f"{node.free_gpus} of {node.gpus} GPUs and {cpus}"


def probe_nodes(nodes: Sequence[Node], device: str) -> list[NodeProbe]:
    """What each node measures of itself, all at the same time; rates are cached on each. GPUs that
    Ray has given to others count as full.

    Args:
        nodes: to ask.
        device: see `probe_this_node`.

    Raises:
        PlacementError: a node did not answer, or cannot measure.
    """
    refs = [_task(node, probe_this_node).remote(node.name, device) for node in nodes]
    found = _answers(nodes, refs, PROBE_TIMEOUT_S)
    return [without_held(probe, node) for node, probe in zip(nodes, found, strict=True)]


def without_held(probe: NodeProbe, node: Node) -> NodeProbe:
    """A node's devices, those GPUs counting as full that Ray has given to others."""
    gpus = {d.device: d.memory.free_bytes for d in probe.devices if d.kind == "gpu"}
    held = gpus.keys() - free_gpus(gpus, node)
    return replace(
        probe,
        devices=tuple(
            replace(device, memory=replace(device.memory, free_bytes=0))
            if device.device in held
            else device
            for device in probe.devices
        ),
    )


def free_gpus(free_bytes: Mapping[T, int], node: Node) -> set[T]:
    """Of a node's GPUs, by their free bytes, those that nobody has: the ones with the most, as Ray
    counts the GPUs that it gives out and does not say which they are."""
    by_room = sorted(free_bytes, key=lambda gpu: free_bytes[gpu], reverse=True)
    return set(by_room[: node.free_gpus])


def look_at_nodes(
    nodes: Sequence[Node], kinds: frozenset[str], held: frozenset[str] = frozenset()
) -> dict[str, tuple[PresentDevice, ...]]:
    """What is there now on each node, by its name; see `present_devices`.

    Raises:
        PlacementError: a node did not answer.
    """
    refs = [_task(node, present_on_this_node).remote(kinds, held) for node in nodes]
    found = _answers(nodes, refs)
    return {node.name: devices for node, devices in zip(nodes, found, strict=True)}


def slowest_link(nodes: Sequence[Node]) -> LinkRate | None:
    """Of the links between nodes that are neighbours by name, up to `MAX_LINKS` of them, one after
    the other, over the encrypted TCP that stages use; None: there are no two nodes.

    Raises:
        PlacementError: a node did not answer, or messages between two did not come back.
    """
    found = [_link(one, other) for one, other in islice(pairwise(nodes), MAX_LINKS)]
    return max(found, key=lambda link: link.latency_s, default=None)


def _link(one: Node, other: Node) -> LinkRate:
    end_class = ray.remote(LinkEnd)
    ends = [
        end_class.options(num_cpus=0, max_restarts=0, **_on(node)).remote(
            node.name, node.ray_id, node.address
        )
        for node in (one, other)
    ]
    try:
        here, there = _answers([one, other], [end.endpoint.remote() for end in ends])
        echo = ends[1].echo.remote(here)
        found: LinkRate
        (found,) = _answers([one], [ends[0].measure.remote(there, one.name, other.name)])
        _answers([other], [echo])
        return found
    finally:
        for end in ends:
            ray.kill(end)


def _task(node: Node, function: Callable[..., Any]) -> Any:
    """The function as a task on this very node, in a process of its own that ends with it, and
    with it its hold on GPUs."""
    return ray.remote(max_calls=1)(function).options(num_cpus=0, max_retries=0, **_on(node))


def _on(node: Node) -> dict[str, Any]:
    """Options of what runs on this very node. Ray would hide GPUs from it, as it reserves none."""
    environment = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "PYTHONSAFEPATH": "1"}
    if "XDG_CACHE_HOME" in os.environ:
        environment["XDG_CACHE_HOME"] = os.environ["XDG_CACHE_HOME"]
    return {
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node.ray_id, soft=False),
        "runtime_env": {"env_vars": environment},
    }


def _answers(
    nodes: Sequence[Node], refs: Sequence[Any], timeout_s: float = LOOK_TIMEOUT_S
) -> list[Any]:
    """What was asked of each node.

    Raises:
        PlacementError: one did not answer within the time limit, or could not.
    """
    _, pending = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
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

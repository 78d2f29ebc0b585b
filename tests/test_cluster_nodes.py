"""What Ray has given to others is not there for a plan."""

import dataclasses

import pytest
from test_probe_command import device, gpu

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.nodes import Node, measure_nodes, without_held
from tightfit.workers.probing.result import NodeProbe

NODE = Node(name="a", ray_id="id-a", address="", cpus=8, gpus=3, free_cpus=8, free_gpus=3)
GIB = 2**30


def with_free(number, free_bytes):
    found = gpu(number)
    return dataclasses.replace(
        found, memory=dataclasses.replace(found.memory, free_bytes=free_bytes)
    )


def probe(*free_bytes):
    gpus = [with_free(number, free) for number, free in enumerate(free_bytes)]
    return NodeProbe(node="a", devices=(device(), *gpus), links=(), notes=(), elapsed_s=1.0)


@pytest.mark.parametrize(
    ("free_gpus", "left"),
    [
        (3, [30 * GIB, 70 * GIB, 50 * GIB]),
        (2, [0, 70 * GIB, 50 * GIB]),
        (1, [0, 70 * GIB, 0]),
        (0, [0, 0, 0]),
    ],
)
def test_of_the_gpus_those_with_least_free_count_as_the_ones_that_others_hold(free_gpus, left):
    node = dataclasses.replace(NODE, free_gpus=free_gpus)
    host, *gpus = without_held(probe(30 * GIB, 70 * GIB, 50 * GIB), node).devices
    assert host == device()
    assert [found.memory.free_bytes for found in gpus] == left


def test_a_node_whose_gpus_or_cpus_are_held_has_no_room_for_a_stage_on_a_gpu():
    assert NODE.has_room("gpu")
    assert NODE.is_idle
    no_gpu = dataclasses.replace(NODE, free_gpus=0)
    assert no_gpu.has_room("cpu")
    assert no_gpu.may_hold("gpu")
    assert not no_gpu.has_room("gpu")
    assert not no_gpu.is_idle
    assert not dataclasses.replace(NODE, free_cpus=0).has_room("gpu")


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"free_gpus": 0}, "auto", r"has a GPU is held .* a: 0 of 3 GPUs and 8 of 8 CPUs\. Add a"),
        ({"free_cpus": 0}, "cpu", r"has a CPU is held .* a: 0 of 8 CPUs\. Add a"),
        ({"gpus": 0, "free_gpus": 0}, "cuda", r"no node of the Ray cluster has a GPU .* \(a\)"),
        ({"cpus": 0, "free_cpus": 0}, "auto", r"no node of the Ray cluster has a CPU .* \(a\)"),
    ],
)
def test_a_cluster_without_room_says_who_has_none(changes, kind, complaint):
    with pytest.raises(PlacementError, match=complaint):
        measure_nodes([dataclasses.replace(NODE, **changes)], kind)


def test_a_cluster_without_nodes_says_so():
    with pytest.raises(PlacementError, match="it has none at all"):
        measure_nodes([], "auto")

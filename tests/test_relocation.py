"""Where a stage goes whose device is gone."""

import dataclasses

import pytest
from test_placement import MIB, NODES, device, gpu, host, plan_for, serve

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.placement import Place, place_on_devices
from tightfit.cluster.relocation import is_there, relocate


def node(name, **changes):
    return dataclasses.replace(NODES[0], name=name, ray_id=f"id-{name}", **changes)


def looking(**devices):
    """What each node has; GPUs that are held are not seen."""

    def look(nodes, kinds, held):
        return {
            n.name: tuple(d for d in devices[n.name] if d.kind in kinds and d.uuid not in held)
            for n in nodes
        }

    return look


def no_answer(nodes, kinds, held):
    raise PlacementError("node a was lost while it measured")


@pytest.fixture
def hosts():
    """Plan, specs and places of a stage on host a and one on host b."""
    plan = plan_for(device("a", 0), device("b", 0), pins={"a:0": (0, 1), "b:0": (1, 4)})
    return plan, *place_on_devices(serve(plan), NODES, {"a": [host()], "b": [host()]})


@pytest.fixture
def gpus():
    """Of a stage on GPU 2 of node a, and one on GPU 0."""
    known = [device("a", n, of="gpu", uuid=f"u{n}", free=900 * MIB) for n in range(3)]
    plan = plan_for(*known, pins={"a:2": (0, 2), "a:0": (2, 4)})
    now = {"a": [gpu(0), gpu(1), gpu(2)], "b": []}
    return plan, *place_on_devices(serve(plan), NODES, now)


def test_a_device_is_there_if_its_node_is_and_a_gpu_by_its_uuid(hosts, gpus):
    _, specs, places = hosts
    assert is_there(specs[1], places, [node("a", free_cpus=0), node("b", free_cpus=0)], looking())
    assert not is_there(specs[1], places, [node("a")], looking())
    _, specs, places = gpus
    assert is_there(specs[0], places, [node("a")], looking(a=[gpu(0), gpu(1), gpu(2, free=0)]))
    assert not is_there(specs[0], places, [node("a")], looking(a=[gpu(0), gpu(1)]))
    assert not is_there(specs[0], places, [node("b")], looking(b=[gpu(2)]))
    assert not is_there(specs[0], places, [node("a")], no_answer)


def test_a_stage_whose_node_is_gone_goes_where_most_room_is(hosts):
    plan, specs, places = hosts
    nodes = [node("a", free_cpus=0), node("c"), node("d"), node("e", free_cpus=1)]
    look = looking(c=[host(150 * MIB)], d=[host(180 * MIB)], e=[host(900 * MIB)])
    spec, place = relocate(plan, specs[1], places, nodes, look)
    assert place == Place(ray_node_id="id-d", gpu_uuid=None)
    assert (spec.planned_device, spec.memory_budget_bytes) == ("d:0", 180 * MIB)
    assert (spec.first_layer, spec.end_layer) == (specs[1].first_layer, specs[1].end_layer)


def test_it_takes_no_more_of_a_larger_device_than_it_was_planned_with(hosts):
    plan, specs, places = hosts
    spec, _ = relocate(plan, specs[1], places, [node("c")], looking(c=[host(10**10)]))
    assert spec.memory_budget_bytes == plan.stages[1].usable_bytes


def test_it_returns_to_a_node_of_the_same_name_rather_than_to_one_with_more_room(hosts):
    plan, specs, places = hosts
    back = dataclasses.replace(node("b"), ray_id="id-b-again")
    look = looking(b=[host(150 * MIB)], c=[host(2**30)])
    spec, place = relocate(plan, specs[1], places, [back, node("c")], look)
    assert (place.ray_node_id, spec.planned_device) == ("id-b-again", "b:0")


def test_a_gpu_that_fell_off_the_bus_is_replaced_by_one_that_nobody_holds(gpus):
    plan, specs, places = gpus
    look = looking(a=[gpu(0), gpu(1)], b=[gpu(7, free=700 * MIB)])
    nodes = [node("a", free_gpus=1), node("b", free_gpus=1)]
    spec, place = relocate(plan, specs[0], places, nodes, look)
    assert place == Place(ray_node_id="id-a", gpu_uuid="u1")
    assert spec.planned_device == "a:1"
    # Where Ray has given it away, the one of the other node is left.
    nodes = [node("a", free_gpus=0), node("b", free_gpus=1)]
    spec, place = relocate(plan, specs[0], places, nodes, look)
    assert (place.gpu_uuid, spec.planned_device) == ("u7", "b:7")


def test_when_no_device_has_the_room_each_is_named_with_what_it_has(hosts):
    plan, specs, places = hosts
    nodes = [node("a", free_cpus=0), node("c"), node("d", free_cpus=2)]
    look = looking(c=[host(MIB)], d=[host(2**30)])
    complaint = r"stage 1, b:0, is gone, and no other cpu has .* and 4 CPUs free; there are c:0: 1"
    with pytest.raises(PlacementError, match=complaint):
        relocate(plan, specs[1], places, nodes, look)
    with pytest.raises(PlacementError, match=r"there are none at all\. Start that node again"):
        relocate(plan, specs[1], places, [], looking())

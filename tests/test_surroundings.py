"""Inventories of the devices that are there."""

import dataclasses

import pytest
from test_probe_command import device, gpu, rates

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.surroundings import HOST_RESERVE_BYTES, live_inventory
from tightfit.workers.probing.result import LinkRate, NodeProbe

GIB = 2**30


def node(name, *devices, notes=()):
    return NodeProbe(node=name, devices=devices, links=(), notes=tuple(notes), elapsed_s=1.0)


def test_gpus_are_taken_where_there_are_any_and_hosts_elsewhere():
    both = [node("n1", device(), gpu(0), gpu(1)), node("n2", device())]
    found = live_inventory(both, "auto").devices
    assert [d.device_id for d in found] == ["n1:0", "n1:1"]
    assert [d.uuid for d in found] == ["GPU-0", "GPU-1"]
    assert {d.type.kind for d in live_inventory(both, "cpu").devices} == {"cpu"}
    assert [d.node for d in live_inventory(both[1:], "auto").devices] == ["n2"]


def test_a_host_keeps_a_reserve_unless_its_share_is_declared():
    (found,) = live_inventory([node("n1", device())], "auto").devices
    reserve = HOST_RESERVE_BYTES + 24 * GIB // 20
    assert 0 <= 20 * GIB + 5000 - reserve - found.free_bytes < 2**20
    (declared,) = live_inventory([node("n1", device())], "cpu", cpu_budget_bytes=7 * GIB).devices
    assert declared.free_bytes == 7 * GIB


def test_a_share_that_is_not_free_is_refused():
    with pytest.raises(
        PlacementError, match=r"more than the 21,474,841,480 that are free .*MemAvail"
    ):
        live_inventory([node("n1", device())], "cpu", cpu_budget_bytes=21 * GIB)


def test_a_kind_that_no_node_has_is_refused_with_what_the_probe_noted():
    with pytest.raises(
        PlacementError, match="no gpu that a plan could use on n1: the driver is old"
    ):
        live_inventory([node("n1", device(), notes=["the driver is old"])], "cuda")


def test_nodes_of_one_kind_of_device_have_the_slowest_ones_rates():
    fast = gpu(0, rates=rates(read=2e12))
    slow = gpu(0, rates=rates(read=1e12))
    found = live_inventory([node("n1", fast), node("n2", slow)], "cuda").devices
    assert {d.type.gb_per_s for d in found} == {1000}
    assert [d.device_id for d in found] == ["n1:0", "n2:0"]


def test_the_way_between_hosts_is_the_link_and_for_gpus_the_copies_to_and_from_them_too():
    between = LinkRate(source="n1", target="n2", bytes_per_s=1e9, latency_s=2e-4)
    hosts = [node("n1", device()), node("n2", device())]
    link = live_inventory(hosts, "cpu", between=between).between_nodes
    assert link.gb_per_s == pytest.approx(1.0)
    assert link.seconds(28 * 2**10) == pytest.approx(2e-4, rel=0.01)

    copies = [
        LinkRate(source=source, target=target, bytes_per_s=1e10, latency_s=1e-5)
        for source, target in [("cpu", "cuda:0"), ("cuda:0", "cpu")]
    ]
    gpus = [dataclasses.replace(node(name, gpu(0)), links=tuple(copies)) for name in ("n1", "n2")]
    link = live_inventory(gpus, "cuda", between=between).between_nodes
    assert link.gb_per_s == pytest.approx(1 / 1.2, rel=0.01)
    assert live_inventory(gpus, "cuda").between_nodes is None

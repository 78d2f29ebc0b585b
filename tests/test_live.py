"""Inventories of the devices that are there."""

import pytest
from test_probe_command import device, gpu, rates

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.live import HOST_RESERVE_BYTES, live_inventory
from tightfit.workers.probing.result import NodeProbe

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
    with pytest.raises(ConfigError, match=r"more than the 21,474,841,480 that are free .*MemAvail"):
        live_inventory([node("n1", device())], "cpu", cpu_budget_bytes=21 * GIB)


def test_a_kind_that_no_node_has_is_refused_with_what_the_probe_noted():
    with pytest.raises(ConfigError, match="no gpu that a plan could use on n1: the driver is old"):
        live_inventory([node("n1", device(), notes=["the driver is old"])], "cuda")


def test_nodes_of_one_kind_of_device_have_the_slowest_ones_rates():
    fast = gpu(0, rates=rates(read=2e12))
    slow = gpu(0, rates=rates(read=1e12))
    found = live_inventory([node("n1", fast), node("n2", slow)], "cuda").devices
    assert {d.type.gb_per_s for d in found} == {1000}
    assert [d.device_id for d in found] == ["n1:0", "n2:0"]

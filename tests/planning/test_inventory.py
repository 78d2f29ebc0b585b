"""Inventories: what is read, and what is refused by name."""

import pytest

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.planning.inventory import (
    CONFIGS,
    read_device_types,
    read_inventory,
)
from tightfit.cluster.planning.memory import Reserve, usable_bytes
from tightfit.cluster.planning.rates import Link

GIB = 2**30
CARD = "{memory: 24GiB, gb_per_s: 900, fp16_tflops: 70, int8_tops: 140, price: 0.2, watts: 300%s}"


@pytest.fixture
def inventory(tmp_path):
    def read(text):
        path = tmp_path / "inventory.yaml"
        path.write_text(text)
        return read_inventory(path)

    return read


def test_pools_become_nodes_and_lots_become_devices_in_order(inventory):
    found = inventory(
        "nodes:\n"
        "  - {name: a, count: 2, devices: [{type: a100-80, count: 2}, {type: t4}]}\n"
        "  - {name: b, devices: [{type: t4, free: 3GiB, price: 0.1}]}\n"
    )
    assert [(d.device_id, d.node, d.type.name) for d in found.devices] == [
        ("a-0:0", "a-0", "a100-80"), ("a-0:1", "a-0", "a100-80"), ("a-0:2", "a-0", "t4"),
        ("a-1:0", "a-1", "a100-80"), ("a-1:1", "a-1", "a100-80"), ("a-1:2", "a-1", "t4"),
        ("b:0", "b", "t4"),
    ]  # fmt: skip
    last = found.devices[-1]
    assert (last.free_bytes, last.price) == (3 * GIB, 0.1)
    assert found.devices[2].price == read_device_types()["t4"].price
    assert found.reserve is Reserve.TIGHT


def test_an_idle_gpu_has_the_room_that_the_formulas_say(inventory):
    text = "types: {x: " + CARD % "" + "}\nreserve: %s\nnodes: [{name: a, devices: [{type: x}]}]"
    tight, safe = inventory(text % "tight"), inventory(text % "safe")
    total = 24 * GIB
    assert tight.usable(tight.devices[0]) == pytest.approx(0.98 * total - GIB, abs=2)
    assert safe.usable(safe.devices[0]) == pytest.approx(0.95 * total - 1930 * 2**20, abs=2)


def test_what_somebody_else_holds_is_not_planned(inventory):
    found = inventory("nodes: [{name: a, devices: [{type: a100-80}, {type: a100-80, free: 9GiB}]}]")
    idle, taken = (found.usable(device) for device in found.devices)
    assert idle - taken == found.devices[0].free_bytes - 9 * GIB


def test_a_nearly_full_gpu_has_no_room_rather_than_less_than_none():
    assert usable_bytes(2**20, 24 * GIB, Reserve.TIGHT, is_gpu=True) == 0
    assert usable_bytes(2**20, 24 * GIB, Reserve.SAFE, is_gpu=True) == 0


def test_a_share_of_a_host_is_planned_to_the_last_byte(inventory):
    kind = CARD % ", kind: cpu"
    found = inventory(f"types: {{host: {kind}}}\nnodes: [{{name: a, devices: [{{type: host}}]}}]")
    assert found.usable(found.devices[0]) == 24 * GIB


def test_measured_rates_of_a_type_are_read_as_seconds_for_a_gb(inventory):
    kind = CARD % ", rates: {int8: {64: 25, 1: 400}, int4: {1: 500.5}}"
    found = inventory(f"types: {{x: {kind}}}\nnodes: [{{name: a, devices: [{{type: x}}]}}]")
    assert found.devices[0].type.rates.by_format == (
        ("int4", ((1, 1 / 500.5),)),
        ("int8", ((1, 1 / 400), (64, 1 / 25))),
    )


def test_links_are_by_node_and_between_nodes_and_take_no_time_where_they_are_not_known(inventory):
    found = inventory(
        "between_nodes: {latency_us: 90, gb_per_s: 3}\n"
        "nodes:\n"
        "  - {name: a, count: 2, devices: [{type: t4}], link: {latency_us: 20.5}}\n"
        "  - {name: b, devices: [{type: t4}]}\n"
    )
    assert found.link("a-1", "a-1") == found.link("a-0", "a-0") == Link(latency_us=20.5)
    assert found.link("b", "b") == Link()
    assert found.link("b", "a-1") == Link(latency_us=90, gb_per_s=3)


NODE = "nodes: [{name: a, devices: [%s]}]"
RATES = "types: {x: " + CARD % ", rates: %s" + "}\nnodes: [{name: a, devices: [{type: x}]}]"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nodes: 3", "nodes: expected a list"),
        ("", "nodes: expected a list"),
        ("nodes: []", "lists no device"),
        ("node: []", "inventory.node is not a setting; did you mean inventory.nodes?"),
        ("reserve: none\n" + NODE % "{type: t4}", "inventory.reserve: 'none' is not one of tight"),
        (NODE % "{typ: t4}", r"nodes\[0\].devices\[0\].typ is not a setting; did you mean"),
        (NODE % "{count: 2}", r"nodes\[0\].devices\[0\].type is missing"),
        (NODE % "{type: a900}", "'a900' is not one of h200"),
        (NODE % "{type: t4, count: 0}", "count: 0 is less than 1"),
        (NODE % "{type: t4, count: 99999999}", "count: 99999999 is more than"),
        (NODE % "{type: t4, count: two}", "count: 'two' is not a whole number"),
        (NODE % "{type: t4, free: 99GiB}", r"free: 99.00 GiB is more than the device has"),
        (NODE % "{type: t4, free: -1}", "free: -1 is less than 0"),
        (NODE % "{type: t4, price: -1}", "price: -1.0 is less than 0"),
        (NODE % "{type: t4, price: .nan}", "price: nan is not finite"),
        (NODE % "{type: t4, total: 5 parsecs}", "total: '5 parsecs' is not a size"),
        (NODE % "{type: t4, type: t4}", "'type' is given twice"),
        (NODE % "t4", "expected `key: value` lines, found 't4'"),
        ("nodes: [{devices: [{type: t4}]}]", r"nodes\[0\].name is missing"),
        ("nodes: [{name: a, count: 0, devices: [{type: t4}]}]", "count: 0 is less than 1"),
        (
            "nodes: [{name: a, devices: [{type: t4}]}, {name: a, devices: [{type: t4}]}]",
            "two nodes called 'a'",
        ),
        (
            "nodes: [{name: a, count: 99999, devices: [{type: t4, count: 99999}]}]",
            "more than 1,000,000 devices",
        ),
        (RATES % "3", "types: x.rates: expected `key: value` lines, found 3"),
        (RATES % "{int9: {1: 3}}", "types: x.rates: 'int9' is not one of fp32, bf16"),
        (RATES % "{int8: 3}", "x.rates.int8: expected GB/s by number of tokens, found 3"),
        (RATES % "{int8: {0: 3}}", "x.rates.int8: 0: 3 is not a number of tokens and GB/s"),
        (RATES % "{int8: {1: -3}}", "x.rates.int8: 1: -3 is not a number of tokens and GB/s"),
        (RATES % "{int8: {1: .inf}}", "x.rates.int8: 1: inf is not a number of tokens and GB/s"),
        (RATES % "{int8: {1: true}}", "x.rates.int8: 1: True is not a number of tokens and GB/s"),
        ("between_nodes: {latency_us: -1}\n" + NODE % "{type: t4}", "between_nodes.latency_us: -1"),
        (
            "nodes: [{name: a, link: {gb_per_s: 0}, devices: [{type: t4}]}]",
            r"nodes\[0\].link.gb_per_s: 0.0 is less than 1e-06",
        ),
        (
            "nodes: [{name: a, link: {gbps: 1}, devices: [{type: t4}]}]",
            "link.gbps is not a setting; did you mean",
        ),
        ("types: {x: {memory: 1GiB}}\n" + NODE % "{type: x}", "x.gb_per_s is missing"),
        (
            "types: {x: " + CARD % ", wats: 3" + "}\n" + NODE % "{type: x}",
            "wats is not a setting; did you mean",
        ),
        (
            "types: {x: " + (CARD % "").replace("24GiB", "0") + "}\n" + NODE % "{type: x}",
            "memory: 0 is less than 1",
        ),
        (
            "types: {x: " + CARD % ", kind: tpu" + "}\n" + NODE % "{type: x}",
            "kind: 'tpu' is not one of gpu, cpu",
        ),
        (
            "types: {x: " + CARD % ", name: y" + "}\n" + NODE % "{type: x}",
            "the key is its name",
        ),
        ("nodes: [", "not valid YAML"),
    ],
)
def test_a_missing_unknown_or_absurd_field_is_named(inventory, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        inventory(text)


def test_every_inventory_that_comes_with_the_package_can_be_read():
    files = sorted((CONFIGS / "inventories").glob("*.yaml"))
    assert len(files) >= 9
    for file in files:
        found = read_inventory(file)
        assert all(found.usable(device) > 0 for device in found.devices), file


def test_a_device_has_less_memory_than_its_name_says_and_more_bandwidth_than_a_tenth_of_it():
    types = read_device_types()
    assert len(types) >= 9
    for name, kind in types.items():
        label = name.rpartition("-")[2]
        if label.isdigit() and int(label) < 1000:
            assert kind.memory_bytes < int(label) * GIB
        assert kind.int8_tops > 0
        assert kind.gb_per_s > 5 * kind.memory_bytes / 10**9

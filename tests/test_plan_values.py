"""`tightfit plan --values`: the chart's pools as an inventory, for what its values would serve."""

import json

import pytest
import yaml
from chart import CHART, over

from tightfit.cluster import cli

VALUES = {
    "serve": {"model": "/models/opt-int4", "format": "int4", "stages": 5},
    "planCheck": {"model": "opt-175b"},
    "pools": {"big": {"nodes": 2, "devices": {"type": "rtx-3090", "count": 4}}},
}


@pytest.fixture(name="run")
def _run(tmp_path, capsys):
    def run(values, *flags):
        """Exit code, what was printed, and what was said of an error."""
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(values))
        flags = tuple(flag.replace("VALUES", str(file)) for flag in flags)
        default = () if "--values" in flags else ("--values", str(file))
        code = cli.main(["plan", *default, *flags])
        return code, *capsys.readouterr()

    return run


def plan_of(answer):
    code, out, error = answer
    assert (code, error) == (0, "")
    return json.loads(out)["plan"]


def test_pools_are_the_inventory_and_serve_says_what_is_planned(run):
    plan = plan_of(run(VALUES, "--json"))
    assert plan["model"] == "opt-175b"
    devices = [stage["device"] for stage in plan["stages"]]
    assert devices == ["big-0:0", "big-0:1", "big-0:2", "big-0:3", "big-1:0"]
    assert {stage["formats"].partition("*")[0] for stage in plan["stages"]} == {"int4"}


def test_a_pool_of_one_node_and_types_of_its_own_are_as_in_an_inventory(run):
    odd = {
        "memory": "48GiB",
        "gb_per_s": 700,
        "fp16_tflops": 90,
        "int8_tops": 180,
        "price": 1,
        "watts": 300,
        "capability": 8.6,
    }
    pools = {"one": {"devices": {"type": "odd", "count": 4, "free": "47GiB", "price": 2}}}
    values = {**VALUES, "deviceTypes": {"odd": odd}, "pools": pools}
    code, out, _ = run(values, "--json")
    tree = json.loads(out)
    assert code == 0
    assert {stage["device"].partition(":")[0] for stage in tree["plan"]["stages"]} == {"one"}
    assert tree["dollars_per_hour"] == 2 * len(tree["plan"]["stages"])


def test_values_over_the_charts_own_defaults_say_the_same(run):
    alone = plan_of(run(VALUES, "--json"))
    merged = run(VALUES, "--values", f"{CHART / 'values.yaml'},VALUES", "--json")
    assert plan_of(merged) == alone


def test_a_later_file_takes_keys_away_with_null(run, tmp_path):
    (tmp_path / "first.yaml").write_text(
        yaml.safe_dump(over(VALUES, {"pools": {"small": {"devices": {"type": "t4"}}}}))
    )
    answer = run(
        {"pools": {"big": None}, "serve": {"stages": None}},
        "--values",
        f"{tmp_path / 'first.yaml'},VALUES",
    )
    assert answer[0] == 1
    assert "the one device would hold at most 12 of 96 layers" in answer[2]


def test_pools_that_are_too_small_are_explained(run):
    code, _, error = run(over(VALUES, {"serve": {"format": "int8", "stages": 8}}))
    assert code == 1
    assert "opt-175b does not fit: all 8 devices hold at most 95 of 96 layers in int8" in error
    assert "or with 1 more rtx-3090" in error


def test_more_stages_than_asked_for_are_not_planned(run):
    code, _, error = run(over(VALUES, {"serve": {"stages": 4}}))
    assert code == 1
    assert "does not fit" in error


def test_each_replica_has_devices_of_its_own(run):
    values = over(VALUES, {"pools": {"big": {"nodes": 3}}, "gateway": {"replicas": 2}})
    code, out, _ = run(values, "--json")
    plans = json.loads(out)["replicas"]["plans"]
    used = [stage["device"] for plan in plans for stage in plan["stages"]]
    assert code == 0
    assert [len(plan["stages"]) for plan in plans] == [5, 5]
    assert len(set(used)) == 10


def test_a_replica_too_many_is_said_to_be_one(run):
    code, _, error = run(over(VALUES, {"gateway": {"replicas": 2}}))
    assert code == 1
    assert error.startswith("tightfit plan: 2 pipelines are asked for, and the inventory holds 1")
    scaled = {"gateway": {"autoscaling": {"enabled": True, "maxReplicas": 2}}}
    assert "2 pipelines are asked for" in run(over(VALUES, scaled))[2]


def test_the_plan_section_goes_over_what_follows_from_serve(run):
    values = over(VALUES, {"plan": {"context": 256, "sequences": 3}})
    plan = plan_of(run(values, "--json"))
    assert (plan["context"], plan["sequences"]) == (256, 3)


def test_flags_go_over_the_values(run):
    assert plan_of(run(VALUES, "--json", "--context", "64"))["context"] == 64
    assert run(VALUES, "bloom-176b", "--max-devices", "8")[1].startswith("bloom-176b on")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pools": {"big": {"devices": {"type": "rtx-9"}}}}, "pools.big.devices.type: 'rtx-9' is"),
        ({"pools": {"big": {"devices": {"count": 0}}}}, "pools.big.devices.count: 0 is less"),
        ({"pools": {"big": {"nodes": 0}}}, "pools.big.nodes: 0 is less"),
        ({"pools": {"big": {"devices": {"kind": 1}}}}, "pools.big.devices.kind is not a setting"),
        ({"pools": {"b": {}}}, "pools.b.devices is missing"),
        ({"deviceTypes": {"odd": {}}}, "deviceTypes: odd.memory is missing"),
        ({"serve": {"format": "int9"}}, "serve.format: 'int9' is not one of"),
        ({"plan": {"formats": "int8"}}, "plan.formats: a service plans its own model"),
        ({"gateway": {"replicas": "two"}}, "gateway.replicas: 'two' is not a whole number"),
    ],
)
def test_what_cannot_be_planned_is_named_as_the_values_have_it(run, change, complaint):
    code, _, error = run(over(VALUES, change))
    assert code != 0
    assert complaint in error
    assert error.count("\n") == 1


def test_nothing_to_plan_is_said(run):
    assert "serve.model is missing" in run({"pools": VALUES["pools"]})[2]
    assert "pools: empty; name one" in run({**VALUES, "pools": {}})[2]
    assert "exclude each other" in run(VALUES, "--values", "VALUES", "--inventory", "2xh200")[2]

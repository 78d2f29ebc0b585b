"""Services whose stages are where a plan says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from served import Served, save_model

from tightfit.client import Client
from tightfit.cluster import cli

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent.parent
INVENTORY = """
types:
  share:
    {kind: cpu, memory: 300MiB, gb_per_s: 20, fp16_tflops: 0.1, int8_tops: 0.1, price: 0, watts: 0}
nodes:
  - {name: a, devices: [{type: share}]}
  - {name: b, devices: [{type: share}]}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def plan_file(model, directory, capsys, *flags):
    inventory, plan = directory / "inventory.yaml", directory / "plan.yaml"
    inventory.write_text(INVENTORY)
    arguments = ["plan", str(model.path), "--inventory", str(inventory), "--context", "256"]
    assert cli.main([*arguments, "--kv-formats", "auto", "--yaml", *flags]) == 0
    plan.write_text(capsys.readouterr().out)
    return plan


def test_stages_are_on_the_nodes_of_the_plan_and_a_lost_node_is_named(model, tmp_path, capsys):
    # The larger part on b, which Ray would not choose by itself.
    plan = plan_file(model, tmp_path, capsys, "--formats", "fp32", "--pin", "b:0=0-3,a:0=4-4")
    done = subprocess.run(
        [
            sys.executable, str(TESTS.parent / "tools" / "loopback.py"), sys.executable,
            str(TESTS / "integration" / "planned_script.py"), str(model.path), str(plan), "20",
        ],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["tokens"] == model.greedy(list(range(20)), 16)
    assert answer["on"] == ["b", "a"]
    assert all("(+0.0%)" in line for line in answer["compare"][:2])
    assert answer["before"] == ["b:0", "a:0"]
    assert answer["after"] == answer["again"] == ["b:0", "a:0", "c:0"]
    assert (
        "stage 0 is planned on b:0 (share), and the cluster has no node b now" in answer["refusal"]
    )
    assert answer["left"] == []


def test_a_stage_moves_to_another_node_and_waits_for_one_where_there_is_none(
    model, tmp_path, capsys
):
    plan = plan_file(model, tmp_path, capsys, "--formats", "fp32", "--pin", "b:0=0-3,a:0=4-4")
    done = subprocess.run(
        [
            sys.executable, str(TESTS.parent / "tools" / "loopback.py"), sys.executable,
            str(TESTS / "integration" / "moving_script.py"), str(model.path), str(plan), "20",
            "200",
        ],
        capture_output=True, text=True, timeout=400, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    expected = model.greedy(list(range(20)), 200)
    before, after, at_last = answer["before"], answer["after"], answer["at_last"]
    assert [stage[:2] for stage in before] == [["b", "b:0"], ["a", "a:0"]]
    right = {"error": "", "tokens": expected}
    assert answer["moved"] == [right] * len(answer["moved"])
    assert [stage[:2] for stage in after] == [["c", "c:0"], ["a", "a:0"]]
    *others, lost = answer["lost"]
    assert others == [right] * len(others)
    assert "the device of stage 0, c:0, is gone, and no other cpu has" in lost["error"]
    assert lost["tokens"] == expected[: len(lost["tokens"])]
    assert answer["again"] == right
    assert [stage[:2] for stage in at_last] == [["d", "d:0"], ["a", "a:0"]]
    assert answer["num_recoveries"] == 2
    assert before[1] == after[1] == at_last[1], "the other stage keeps its process"


def test_without_stages_or_plan_a_service_plans_for_what_it_measures(model, tmp_path):
    file = tmp_path / "t.yaml"
    file.write_text("plan: {sequences: 2, context: 128}\n")
    flags = ("--config", str(file), "--format", "fp32", "--memory-budget", "300MiB")
    with Served(model.path, *flags) as served, Client(served.target, timeout_s=60) as client:
        answer = client.generate(list(range(30)), max_tokens=12)
        assert list(answer.token_ids) == model.greedy(list(range(30)), 12)
        (stage,) = client.status().stages
        assert stage.planned_device == f"{os.uname().nodename}:0"
        assert stage.memory.budget_bytes == 300 * 2**20
    assert "planned: tiny on 1 × measured-" in served.errors
    assert f"stage 0 on {stage.planned_device}: planned" in served.errors


def test_a_plan_with_two_formats_is_served_by_a_private_cluster(model, tmp_path, capsys):
    flags = ("--formats", "int4,int8", "--mixed", "--min-bits", "6.5", "--pin", "a:0=0-4")
    plan = plan_file(model, tmp_path, capsys, *flags)
    formats = yaml.safe_load(plan.read_text())["stages"][0]["formats"]
    assert {word.split("*")[0] for word in formats.split()} == {"int4", "int8"}
    with (
        Served(model.path, "--plan", str(plan)) as served,
        Client(served.target, timeout_s=60) as client,
    ):
        assert len(client.generate(list(range(30)), max_tokens=12).token_ids) == 12
        (stage,) = client.status().stages
        assert stage.format.startswith("int4/int8 mixed, ")
        assert stage.memory.weight_bytes == stage.memory.predicted_weight_bytes
    assert "(+0.0%)" in served.errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--memory-budget", "20KiB"), "does not fit"),
        (("--plan", "/nowhere.yaml"), "/nowhere.yaml"),
        (("--device", "cuda"), "no node of the Ray cluster has a GPU to give out"),
    ],
)
def test_what_cannot_be_planned_is_refused_and_nothing_is_left(model, flags, message):
    served = Served(model.path, *flags, wait=False)
    with served:
        _, errors = served.process.communicate(timeout=120)
        assert served.process.returncode == 1
        assert message in errors
        assert "Traceback" not in errors
        assert served.left_behind() == []

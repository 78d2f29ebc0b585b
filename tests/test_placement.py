"""From a configuration, or a plan, to what every stage is told and where it is to run."""

import dataclasses
import os
from pathlib import Path

import pytest

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.errors import ConfigError, PlacementError
from tightfit.cluster.model import ModelDescription
from tightfit.cluster.nodes import Node
from tightfit.cluster.placement import by_number, by_plan, place_on_devices
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.inventory import Device, DeviceType, Inventory
from tightfit.cluster.planning.plan import dump_plan, read_plan
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.kernels.formats import Format
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.probing.result import PresentDevice

MIB = 2**20
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def model(**changes):
    config = decoder_config({**LLAMA, **changes})
    return ModelDescription(path=Path("m"), config=config, source_format="safetensors")


def placed(**settings):
    return by_number(ServeConfig(model="m", **settings), model())


# -- by number -------------------------------------------------------------------------------


def test_every_stage_is_told_the_formats():
    specs = placed(stages=2, format="int4", head_format="bf16", kv_format="int8").specs
    assert [(s.first_layer, s.end_layer) for s in specs] == [(0, 2), (2, 4)]
    assert {(s.format, s.head_format, s.kv_format) for s in specs} == {("int4", "bf16", "int8")}


def test_formats_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"head_format: layers in fp32 .* choose fp32 for both"):
        placed(stages=1, format="fp32", head_format="int8")


def test_stages_share_the_cores_of_a_private_cluster_unless_told_otherwise():
    cores = len(os.sched_getaffinity(0))
    assert placed(stages=1).specs[0].num_threads == cores
    assert placed(stages=4).specs[0].num_threads == max(1, cores // 4)
    assert placed(stages=4, threads_per_stage=7).specs[0].num_threads == 7
    assert placed(stages=1, ray_address="auto").specs[0].num_threads == 1


# -- by plan ---------------------------------------------------------------------------------


def kind(name="cpu"):
    return DeviceType(
        name=f"some-{name}", kind=name, memory_bytes=2**30, gb_per_s=20, fp16_tflops=0.1,
        int8_tops=0.2, price=1.0, watts=10.0,
    )  # fmt: skip


def device(node, number, *, of="cpu", uuid=None, free=200 * MIB):
    return Device(
        device_id=f"{node}:{number}", node=node, type=kind(of), total_bytes=2**30,
        free_bytes=free, price=1.0, uuid=uuid,
    )  # fmt: skip


def plan_for(*devices, pins, config=None, **request):
    config = model().config if config is None else config
    asked = PlanRequest(
        model=config, inventory=Inventory(devices=devices), context=64, pins=pins,
        **{"formats": ("int8",), **request},
    )  # fmt: skip
    return make_plan("m", asked)


@pytest.fixture
def two_hosts():
    """Layer 0 on host a, the others on host b."""
    return plan_for(device("a", 0), device("b", 0), pins={"a:0": (0, 1), "b:0": (1, 4)})


@pytest.fixture
def two_gpus():
    """Layers 0 and 1 on GPU 2 of node a, the others on GPU 0."""
    gpus = [device("a", n, of="gpu", uuid=f"u{n}", free=900 * MIB) for n in range(3)]
    return plan_for(*gpus, pins={"a:2": (0, 2), "a:0": (2, 4)})


NODES = [
    Node(name=name, ray_id=f"id-{name}", address="", cpus=4, gpus=3, free_cpus=4, free_gpus=3)
    for name in ("a", "b")
]


def host(free=2**30):
    return PresentDevice(device="cpu", uuid=None, total_bytes=2**30, free_bytes=free)


def gpu(number, free=900 * MIB):
    return PresentDevice(
        device=f"cuda:{number}", uuid=f"u{number}", total_bytes=2**30, free_bytes=free
    )


def serve(plan, **settings):
    return by_plan(ServeConfig(model="m", **settings), model(), plan)


def test_a_stage_holds_what_its_plan_says_in_the_room_that_it_gives(two_hosts):
    placement = serve(two_hosts)
    assert [(s.first_layer, s.end_layer) for s in placement.specs] == [(0, 1), (1, 4)]
    assert [s.memory_budget_bytes for s in placement.specs] == [200 * MIB, 200 * MIB]
    assert [s.planned_device for s in placement.specs] == ["a:0", "b:0"]
    assert {s.format for s in placement.specs} == {"int8"}
    assert placement.config.device == "cpu"


def test_a_plan_is_the_same_after_it_was_written_and_read(two_gpus, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(dump_plan(two_gpus))
    assert read_plan(file) == two_gpus
    assert [stage.uuid for stage in read_plan(file).stages] == ["u2", "u0"]


def test_layers_of_different_formats_keep_theirs():
    plan = plan_for(
        device("a", 0), pins={}, formats=("int4", "int8"), is_mixed=True,
        min_bits=6.0, spare=Spare.KV,
    )  # fmt: skip
    words = [fmt for fmt, n in [word.split("*") for word in plan.stages[0].formats.split()]]
    assert words == ["int8", "int4"]
    (spec,) = serve(plan).specs
    assert spec.layer_formats[0] == "int8"
    assert spec.layer_formats[-1] == "int4"
    assert len(spec.layer_formats) == 4
    formats = serve(plan).formats
    held = [formats.scheme("qkv", i).format for i in range(4)]
    assert held == [Format(fmt) for fmt in spec.layer_formats]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"format": "int4"}, r"serve\.format is int4, and the plan says int8"),
        ({"head_format": "bf16"}, r"serve\.head_format is bf16, and the plan says int8"),
        ({"memory_budget_bytes": 1}, r"serve\.memory_budget: each stage's is in the plan"),
    ],
)
def test_settings_that_say_otherwise_than_the_plan_are_refused(two_hosts, settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        serve(two_hosts, **settings)


def test_a_plan_of_another_model_is_refused_by_the_bytes(two_hosts):
    config = ServeConfig(model="m")
    with pytest.raises(PlacementError, match=r"of 4 layers, and m has 3"):
        by_plan(config, model(num_hidden_layers=3), two_hosts)
    with pytest.raises(PlacementError, match=r"not for this model: stage 0 on a:0 .* of weights"):
        by_plan(config, model(intermediate_size=192), two_hosts)


def test_a_mix_by_sensitivities_needs_its_own_checkpoint(two_hosts):
    stages = [
        dataclasses.replace(stage, formats=f"mix*{stage.num_layers}") for stage in two_hosts.stages
    ]
    with pytest.raises(PlacementError, match=r"write it with `tightfit quantize --budget`"):
        serve(dataclasses.replace(two_hosts, stages=tuple(stages)))


# -- on devices ------------------------------------------------------------------------------


def test_every_stage_goes_to_its_node_with_its_share_of_the_cores(two_hosts):
    specs, places = place_on_devices(serve(two_hosts), NODES, {"a": [host()], "b": [host()]})
    assert [place.ray_node_id for place in places] == ["id-a", "id-b"]
    assert [spec.num_threads for spec in specs] == [4, 4]
    assert [spec.memory_budget_bytes for spec in specs] == [200 * MIB, 200 * MIB]


def test_a_gpu_is_found_by_its_uuid_though_its_number_has_changed(two_gpus):
    # GPU 1 has fallen off the bus: torch counts on without it.
    now = {"a": [gpu(0), dataclasses.replace(gpu(2), device="cuda:1")]}
    specs, places = place_on_devices(serve(two_gpus), NODES, now)
    assert [place.gpu_uuid for place in places] == ["u2", "u0"]
    assert [spec.num_threads for spec in specs] == [2, 2]


def test_a_node_that_is_gone_is_named_with_those_that_are_there(two_hosts):
    complaint = (
        r"stage 1 is planned on b:0 \(some-cpu\), and the cluster has no node b now; it has: a"
    )
    with pytest.raises(PlacementError, match=complaint):
        place_on_devices(serve(two_hosts), NODES[:1], {"a": [host()]})


def test_a_gpu_that_has_vanished_since_it_was_planned_is_named(two_gpus):
    complaint = r"stage 0 is planned on a:2 .* no such device with UUID u2 now: it has 2 usable gpu"
    with pytest.raises(PlacementError, match=complaint):
        place_on_devices(serve(two_gpus), NODES, {"a": [gpu(0), gpu(1)]})


def test_memory_that_another_process_has_taken_since_is_missed_before_anything_starts(two_gpus):
    with pytest.raises(PlacementError, match=r"stage 1 is planned on a:0 .* Another process has"):
        place_on_devices(serve(two_gpus), NODES, {"a": [gpu(0, free=520 * MIB), gpu(1), gpu(2)]})


def test_less_room_than_planned_takes_tokens_as_long_as_the_workload_fits(two_gpus):
    full, _ = place_on_devices(serve(two_gpus), NODES, {"a": [gpu(0), gpu(1), gpu(2)]})
    less, _ = place_on_devices(
        serve(two_gpus), NODES, {"a": [gpu(0, free=800 * MIB), gpu(1), gpu(2)]}
    )
    assert full[1].memory_budget_bytes == two_gpus.stages[1].usable_bytes
    assert less[1].memory_budget_bytes == full[1].memory_budget_bytes - 100 * MIB


def test_shares_of_one_host_have_to_fit_it_together():
    plan = plan_for(device("a", 0), device("a", 1), pins={"a:0": (0, 1), "a:1": (1, 4)})
    needed = sum(s.weight_bytes + s.workspace_bytes for s in plan.stages)
    with pytest.raises(PlacementError, match=r"of a's memory .* are free now"):
        place_on_devices(serve(plan), NODES, {"a": [host(free=needed)]})
    specs, _ = place_on_devices(serve(plan), NODES, {"a": [host(free=needed + 10 * MIB)]})
    assert sum(spec.memory_budget_bytes for spec in specs) <= needed + 10 * MIB

"""What is said of a plan, and of a model that does not fit, is so."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.explain import explain, why_not
from tightfit.cluster.planning.inventory import CONFIGS, read_inventory
from tightfit.cluster.planning.planner import fits, solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.rates import Link, Rates
from tightfit.cluster.planning.report import report
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.settings import read_yaml
from tightfit.workers.decoder_config import decoder_config


def request_for(model, inventory, **options):
    config = decoder_config(read_yaml(CONFIGS / "models" / f"{model}.yaml"))
    return PlanRequest(
        model=config,
        inventory=read_inventory(CONFIGS / "inventories" / f"{inventory}.yaml"),
        **options,
    )


def explained(request):
    solution = solve(request)
    plan = make_plan("m", request, solution)
    return plan, explain(request, solution, plan)


def test_a_plan_says_what_one_device_less_holds_and_what_it_would_take():
    request = request_for("bloom-176b", "8xa100-80")
    plan, said = explained(request)
    assert len(plan.stages) == 2
    held = re.search(
        r"the roomiest alone would hold at most (\d+) of 70 layers in int4", said.proof
    )
    # 76.57 GiB, less workspace; 1.22 GiB for a layer, 58 MB for its 2,048 tokens.
    assert int(held[1]) == 59
    (remedy,) = said.remedies
    layers = re.fullmatch(r"int3 for (\d+) of the 70 layers and int4 for the others", remedy)
    mixed = replace(request, formats=("int3", "int4"), is_mixed=True, spare=Spare.QUALITY)
    found = solve(replace(mixed, max_devices=1))
    assert 70 - sum(run.num_better for run in found.runs) == int(layers[1])


def test_the_stage_that_binds_is_the_one_without_room_for_another_block():
    plan, said = explained(request_for("bloom-176b", "8xa100-80"))
    assert said.binds.startswith("stage 0 (a:0) has room for 32,928 tokens and no more")
    assert plan.stages[0].headroom_bytes < plan.stages[0].kv_bytes / plan.kv_blocks
    assert plan.stages[1].headroom_bytes > plan.stages[1].kv_bytes / plan.kv_blocks


def test_in_16_bits_the_same_model_takes_more_of_the_same_devices():
    plan, said = explained(request_for("opt-175b", "8xa100-80"))
    assert said.baseline.devices > 2 * len(plan.stages)
    assert said.baseline.dollars_per_hour == said.baseline.devices * plan.stages[0].price


def test_the_cheapest_plan_says_how_many_cheaper_choices_do_not_do():
    request = request_for("bloom-176b", "mixed-lot", objective=Objective.DOLLARS)
    plan, said = explained(request)
    assert f"for less than ${plan.dollars_per_hour:.2f} an hour" in said.proof
    assert not fits(replace(request, max_dollars=plan.dollars_per_hour - 0.01))


@pytest.mark.parametrize(
    ("model", "inventory", "options", "lacks", "remedies"),
    [
        (
            "bloom-176b", "2xh200", {"formats": ("bf16",)},
            "all 2 devices hold at most 58 of 70 layers in bf16",
            ["int8 for 27 of the 70 layers and bf16 for the others", "1 more h200"],
        ),
        (
            "llama-3.1-405b", "8xrtx-3090", {},
            "all 8 devices hold at most 104 of 126 layers in int4", ["2 more rtx-3090"],
        ),
        (
            "opt-175b", "8xrtx-3090", {"sequences": 32},
            "KV cache for 65,536 tokens", ["KV cache for ", "more rtx-3090"],
        ),
        (
            "bloom-176b", "8xa100-80", {"formats": ("int8",), "max_devices": 2},
            "the roomiest 2 hold at most 64 of 70 layers in int8",
            ["int4 for ", "1 more a100-80"],
        ),
        (
            "bloom-176b", "8xa100-80",
            {"formats": ("int3",), "embedding_places": ("device",), "max_devices": 1},
            "hold at most", ["the embedding on the host"],
        ),
        (
            "opt-175b", "8xrtx-3090",
            {"kv_formats": ("auto",), "sequences": 8, "max_devices": 7},
            "with KV cache for 16,384 tokens", ["keys and values in int8"],
        ),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_told_what_lacks_and_what_would_do(
    model, inventory, options, lacks, remedies
):
    request = request_for(model, inventory, **options)
    assert not fits(request)
    said = why_not(model, request)
    assert said.startswith(f"{model} does not fit: ")
    assert lacks in said
    for remedy in remedies:
        assert remedy in said


def test_every_remedy_in_numbers_works_and_a_smaller_one_does_not():
    request = request_for("opt-175b", "8xrtx-3090", sequences=32)
    tokens = int(
        re.search(r"KV cache for ([\d,]+) tokens instead", why_not("m", request))[1].replace(
            ",", ""
        )
    )
    assert fits(replace(request, sequences=tokens // 16, context=16))
    assert not fits(replace(request, sequences=tokens // 16 + 1, context=16))


def test_devices_that_hold_no_layer_at_all_are_told_so():
    request = request_for(
        "llama-3.1-405b",
        "mixed-lot",
        exclude=frozenset({"server", "box"}),
        formats=("int8",),
        max_batch_tokens=32_768,
    )
    said = why_not("m", request)
    assert "no device holds one layer: old:0 (t4) has 13.31 GiB to use, and a layer takes" in said
    assert "No single change" in said


def test_the_table_has_a_line_for_each_stage_and_names_what_cannot_be_served_yet():
    request = request_for("bloom-176b", "16xv100-32")
    plan, said = explained(request)
    lines = report(request, plan, said).splitlines()
    assert lines[0] == f"m on {len(plan.stages)} × v100-32: 4.25 bits per weight"
    rows = lines[3 : 3 + len(plan.stages)]
    assert [row.split()[1] for row in rows] == [stage.device for stage in plan.stages]
    assert lines[-1].endswith("stages do not run on v100-32 yet: planned only")


def test_a_pipelines_time_for_a_token_is_the_time_to_read_it_all():
    plan, _ = explained(request_for("bloom-176b", "8xa100-80", formats=("int8",)))
    read = 172.6e9 + 3.6e9 + 2048 * 70 * 2 * 112 * 130
    assert plan.token_s == pytest.approx(read / 2039e9, rel=0.01)


RATES = Rates(
    (("int4", ((1, 0.002), (64, 0.004), (256, 0.01))), ("int8", ((1, 0.001), (64, 0.003))))
)


def measured(request, **links):
    """The same on devices whose rates were measured."""
    inventory = request.inventory
    devices = tuple(
        replace(device, type=replace(device.type, rates=RATES)) for device in inventory.devices
    )
    return replace(request, inventory=replace(inventory, devices=devices, **links))


def test_where_rates_were_measured_times_are_by_them_and_the_table_says_so():
    request = measured(request_for("bloom-176b", "8xa100-80", formats=("int4",)))
    plan, said = explained(request)
    kv = 2048 * 70 * 2 * 112 * 130
    head = 250_880 * 14_336
    layers = sum(stage.layer_bytes for stage in plan.stages)
    assert plan.token_s == pytest.approx(
        layers * 0.002e-9 + head * 0.001e-9 + kv / 2039e9, rel=1e-3
    )
    by = min(512 / (stage.layer_bytes * 1e-9 * (0.01 + 256 * 0.006 / 192)) for stage in plan.stages)
    assert plan.prefill_tokens_per_s == pytest.approx(by, rel=1e-3)
    assert "by measured rates, links cost nothing" in report(request, plan, said)
    partly = measured(request_for("bloom-176b", "8xa100-80", formats=("bf16",), sequences=8))
    plan, said = explained(partly)
    assert "at best, by the devices' data sheets" in report(partly, plan, said)


def test_links_are_in_the_time_of_a_token_once_for_each_stage_and_once_back():
    free = request_for("bloom-176b", "8xa100-80", sequences=2)
    inventory = replace(free.inventory, within_node={"a": Link(latency_us=500, gb_per_s=0.028672)})
    request = replace(free, inventory=inventory)
    (before, _), (plan, said) = explained(free), explained(request)
    assert len(plan.stages) == 2
    # To the first stage and back go token ids, between the stages 28 KiB for a token.
    hop = 3 * 500e-6 + 1e-3
    assert plan.token_s == pytest.approx(before.token_s + hop)
    # Two sequences, two stages: the slower stage is the limit, or the round with its links.
    times = plan.step_s(1)
    assert plan.tokens_per_s == pytest.approx(2 / max(sum(times) + hop, 2 * max(times)))
    assert "links counted" in report(request, plan, said)


def test_links_between_nodes_count_where_stages_are_on_several():
    request = request_for("bloom-176b", "three-node-pool", formats=("int8",))
    far = replace(request.inventory, between_nodes=Link(latency_us=10_000))
    (before, _), (plan, _) = explained(request), explained(replace(request, inventory=far))
    changes = sum(a.node != b.node for a, b in pairwise([*plan.stages, plan.stages[0]]))
    assert changes >= 2
    assert plan.token_s == pytest.approx(before.token_s + changes * 0.01)


def test_with_many_sequences_a_pipeline_gives_more_tokens_but_not_more_than_it_can_multiply():
    one, many, most = (
        explained(request_for("bloom-176b", "8xa100-80", sequences=n, context=64))[0]
        for n in (1, 8, 512)
    )
    assert one.tokens_per_s == pytest.approx(1 / one.token_s)
    assert many.tokens_per_s > 4 * one.tokens_per_s
    assert most.tokens_per_s <= most.prefill_tokens_per_s * 1.001

"""How many pipelines an inventory holds: as many as any way of dividing its devices gives."""

from dataclasses import replace
from functools import cache
from itertools import chain, combinations
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning import replicas as module
from tightfit.cluster.planning.inventory import (
    CONFIGS,
    Device,
    DeviceType,
    Inventory,
    read_device_types,
    read_inventory,
)
from tightfit.cluster.planning.planner import fits, solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.replicas import make_replicas
from tightfit.cluster.planning.request import PlanRequest
from tightfit.cluster.settings import read_yaml
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import model_formats
from tightfit.workers.workspace import workspace_bytes

GIB = 2**30
TYPES = read_device_types()
TOTAL = 2**30


def shipped(name):
    return decoder_config(read_yaml(CONFIGS / "models" / f"{name}.yaml"))


def request_for(model, inventory, **options):
    devices = read_inventory(CONFIGS / "inventories" / f"{inventory}.yaml")
    return PlanRequest(model=shipped(model), inventory=devices, **options)


def replicas(request, wanted=None):
    return make_replicas("m", request, wanted, solve(request))


def check_disjoint(request, found):
    used = [stage.device for plan in found.plans for stage in plan.stages]
    assert len(used) == len(set(used))
    assert set(used) <= {device.device_id for device in request.inventory.devices}
    for plan in found.plans:
        assert plan.kv_blocks >= request.needed_blocks
        if request.max_devices is not None:
            assert len(plan.stages) <= request.max_devices
        if request.max_dollars is not None:
            assert plan.dollars_per_hour <= request.max_dollars
        if request.same_node:
            assert len({stage.node for stage in plan.stages}) == 1


# -- against every way there is ----------------------------------------------------------------


def small_request(seed):
    draw = Random(seed).choice
    model = decoder_config(
        {
            "model_type": "llama", "hidden_size": 256, "intermediate_size": 256,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": draw([64, 333]), "max_position_embeddings": 64,
            "tie_word_embeddings": False,
        }
    )  # fmt: skip
    reserved = 512 * 2**20 + TOTAL // 50
    reserved += max(
        workspace_bytes(model, model_formats(model, name, kv="int8", device="cuda"), 16)
        for name in ("int4", "int8")
    )
    few = [draw(range(250_001, 1_300_000, 50_021)) for _ in range(3)]
    devices = tuple(
        Device(
            device_id=f"n{number % 2}:{number}", node=f"n{number % 2}",
            type=DeviceType(
                name="t", memory_bytes=TOTAL, gb_per_s=1, fp16_tflops=1.0, int8_tops=1.0,
                price=1.0, watts=1.0,
            ),
            total_bytes=TOTAL, free_bytes=reserved + draw(few), price=draw([1.0, 2.0]),
        )
        for number in range(draw([4, 5, 6, 7]))
    )  # fmt: skip
    return PlanRequest(
        model=model, inventory=Inventory(devices=devices), context=64,
        formats=draw([("int4",), ("int8",)]), embedding_places=("host",), kv_formats=("int8",),
        objective=draw(list(Objective)), max_devices=draw([None, None, 2]),
        max_dollars=draw([None, None, 4.0]), same_node=draw([False, False, True]),
        max_batch_tokens=16, room_grain_bytes=1,
    )  # fmt: skip


def most_by_brute_force(request):
    devices = request.inventory.devices

    def holds(subset):
        return fits(replace(request, inventory=Inventory(devices=subset)))

    subsets = [
        frozenset(subset)
        for subset in chain.from_iterable(
            combinations(range(len(devices)), size) for size in range(1, len(devices) + 1)
        )
        if holds(tuple(devices[i] for i in subset))
    ]

    @cache
    def most(left):
        return max((1 + most(left - subset) for subset in subsets if subset <= left), default=0)

    return most(frozenset(range(len(devices))))


@given(seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_no_way_of_dividing_the_devices_gives_more_pipelines(seed):
    request = small_request(seed)
    if solve(request) is None:
        return
    found = replicas(request)
    check_disjoint(request, found)
    assert len(found.plans) == found.most == most_by_brute_force(request)
    assert found.proof.startswith("there can be no more")


def test_many_of_these_cases_hold_several_pipelines():
    requests = [request for request in map(small_request, range(60)) if solve(request)]
    found = [replicas(request) for request in requests]
    counts = [len(one.plans) for one in found]
    assert sum("every way of dividing" in one.proof for one in found) > 8
    assert counts.count(1) > 8
    assert sum(count >= 2 for count in counts) > 12


# -- promises ----------------------------------------------------------------------------------


def gpus(*names):
    return Inventory(
        devices=tuple(
            Device(
                device_id=f"n:{i}", node="n", type=TYPES[name],
                total_bytes=TYPES[name].memory_bytes,
                free_bytes=TYPES[name].memory_bytes - GIB // 2, price=TYPES[name].price,
            )
            for i, name in enumerate(names)
        )
    )  # fmt: skip


def test_the_first_pipeline_is_the_best_plan_where_that_costs_none_of_the_others():
    request = request_for("bloom-176b", "8xa100-80")
    found = replicas(request)
    assert [s.device for s in found.plans[0].stages] == ["a:0", "a:1"]
    assert len(found.plans) == found.most == 4
    assert found.proof == "there can be no more: a pipeline takes at least 2 of the 8 devices"
    check_disjoint(request, found)


def test_devices_are_divided_anew_where_taking_the_best_plan_first_loses_a_pipeline():
    # The best plan takes both large ones, after which the small ones hold no model. A large and
    # some small ones do, twice.
    inventory = gpus("a100-80", "a100-80", *["rtx-3090"] * 4)
    request = PlanRequest(model=shipped("bloom-176b"), inventory=inventory, formats=("int4",))
    best = solve(request)
    assert len(best.runs) == 2
    found = replicas(request)
    assert len(found.plans) == found.most == 2
    assert all("a100-80" in {s.type for s in plan.stages} for plan in found.plans)
    assert found.proof.endswith("every way of dividing the devices was looked at")
    check_disjoint(request, found)


def test_as_many_as_are_asked_for_are_made_and_no_more():
    request = request_for("bloom-176b", "8xa100-80")
    found = replicas(request, 3)
    assert len(found.plans) == 3
    assert found.most == 4
    with pytest.raises(PlacementError, match=r"5 pipelines are asked for, .* holds 4 of m: there"):
        replicas(request, 5)


def test_pins_are_for_one_pipeline_only():
    request = request_for("bloom-176b", "8xa100-80", pins={"a:0": (0, 30)})
    with pytest.raises(PlacementError, match="pinned to devices of one pipeline"):
        replicas(request)


def test_excluded_devices_are_in_none():
    request = request_for("bloom-176b", "8xa100-80", exclude=frozenset({"a:0", "a:5", "a:6"}))
    found = replicas(request)
    assert len(found.plans) == 2
    used = {stage.device for plan in found.plans for stage in plan.stages}
    assert used.isdisjoint(request.exclude)


def test_where_there_are_too_many_ways_it_is_said_what_is_known():
    inventory = gpus("a100-80", "a100-80", *["rtx-3090"] * 4)
    request = PlanRequest(model=shipped("bloom-176b"), inventory=inventory, formats=("int4",))
    with patch.object(module, "MAX_COUNTS", 1):
        found = replicas(request)
    assert len(found.plans) == 1
    assert found.most > 1
    assert found.proof.startswith("1 were found one after the other; at most")

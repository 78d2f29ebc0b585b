"""When a better plan has become possible."""

import threading
from dataclasses import replace

import pytest
from test_placement import device, model, plan_for

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.ask import request_of
from tightfit.cluster.planning.inventory import Device, DeviceType, Inventory
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.planning.rates import Rates
from tightfit.cluster.replanning import PlanWatch, better_plan

MIB = 2**20
MANY = 10**9


@pytest.fixture
def served() -> Plan:
    return plan_for(device("a", 0), device("b", 0), pins={"a:0": (0, 1), "b:0": (1, 4)})


def better(served, *devices, most=MANY):
    request = request_of(served, model().config, Inventory(devices=()))
    return better_plan(request, served, Inventory(devices=devices), max_kv_blocks=most)


def test_the_request_of_a_plan_is_met_by_that_plan(served):
    request = request_of(served, model().config, Inventory(devices=()))
    assert (request.formats, request.context, request.sequences) == (("int8",), 64, 1)
    assert request.kv_formats == ("int8",)


def test_fewer_devices_are_better(served):
    said = better(served, device("a", 0), device("b", 0))
    assert said == "1 devices instead of 2, on a:0"


def alone(**changes):
    return plan_for(device("a", 0), pins={}, **changes)


def test_the_same_devices_are_no_better():
    assert better(alone(), device("a", 0)) is None


def test_more_tokens_are_better_up_to_the_most_that_is_allocated():
    roomy = device("c", 0, free=400 * MIB)
    served = alone()
    assert "KV cache for" in better(served, device("a", 0), roomy)
    assert better(served, device("a", 0), roomy, most=served.kv_blocks) is None


def test_a_faster_device_is_better():
    fast = DeviceType(
        name="fast", kind="cpu", memory_bytes=2**30, gb_per_s=200, fp16_tflops=1.0,
        int8_tops=2.0, price=1.0, watts=10.0,
    )  # fmt: skip
    other = Device(
        device_id="c:0", node="c", type=fast, total_bytes=2**30, free_bytes=200 * MIB, price=1.0
    )
    assert "ms a token on the slowest stage instead of" in better(alone(), device("a", 0), other)


def test_times_by_measured_rates_are_not_compared_with_those_of_a_data_sheet():
    slow = Rates(tuple((name, ((1, 1.0),)) for name in ("int8", "bf16")))
    plain = device("a", 0)
    measured = replace(plain, type=replace(plain.type, rates=slow))
    served = plan_for(measured, pins={})
    assert served.step_s(1)[0] > 5 * alone().step_s(1)[0]
    assert better(served, plain) is None
    assert better(served, measured) is None


def test_less_than_what_is_served_is_no_news(served):
    assert better(served, device("a", 0, free=17 * MIB)) is None


def test_news_is_told_once_and_again_when_it_is_none_any_more():
    answers = iter(["x", "x", PlacementError("no answer"), "x", None, None])
    told, over = [], threading.Event()

    def look():
        answer = next(answers, over)
        if answer is over:
            over.set()
            return None
        if isinstance(answer, Exception):
            raise answer
        return answer

    watch = PlanWatch(look, 0.001, told.append)
    watch.start()
    assert over.wait(10)
    watch.close()
    assert told == ["x", None]

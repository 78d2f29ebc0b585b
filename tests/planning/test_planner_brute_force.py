"""The planner against every way there is, on small cases."""

from dataclasses import replace
from itertools import combinations, pairwise, permutations, product
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.cluster.planning import packing
from tightfit.cluster.planning.inventory import Device, DeviceType, Inventory
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.rates import NO_RATES, Rates
from tightfit.cluster.planning.request import PlanRequest, Spare, Variant, layer_formats
from tightfit.kernels.formats import kv_vector_bytes
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import model_formats
from tightfit.workers.sensitivity import BLOCK_ROLES, MIX_FORMATS
from tightfit.workers.shard_bytes import (
    bits_per_weight,
    embedding_bytes,
    head_bytes,
    head_format_bytes,
    head_is_shared,
    layer_bytes,
    layer_format_bytes,
)
from tightfit.workers.workspace import workspace_bytes

TOTAL = 2**30
ROOMS = (*range(300_001, 900_000, 30_023), 1_250_000, 1_700_000, 100_000)
"""For weights and KV cache; a layer takes about 160, 210 or 400 kB."""

SECONDS_PER_GB = (0.2, 0.3, 0.5, 1.0, 3.0)


def small_model(num_layers, vocab_size, tied):
    return decoder_config(
        {
            "model_type": "llama",
            "hidden_size": 256,
            "intermediate_size": 256,
            "num_hidden_layers": num_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 64,
            "tie_word_embeddings": tied,
        }
    )


def rates_of(draw):
    """Of formats; where one of few bits is slower than one of more, as some are on CPUs."""
    return Rates(
        tuple(
            (name, ((1, draw(SECONDS_PER_GB)), (4, draw(SECONDS_PER_GB) + 1)))
            for name in ("bf16", "int3", "int4", "int8")
        )
    )


def request_of(seed):
    """A random case: where hypothesis draws each number, most cases are too poor to fit."""
    draw = Random(seed).choice
    model = small_model(draw([2, 3, 4, 5]), draw([64, 150, 333, 1000]), draw([False, True]))
    # The reserve and one workspace come on top; a format of keys and values has a larger one.
    workspace = workspace_bytes(model, model_formats(model, "int8", device="cuda"), 16)
    reserved = 512 * 2**20 + TOTAL // 50
    devices = tuple(
        Device(
            device_id=f"n:{number}",
            node="n",
            type=DeviceType(
                name="t", memory_bytes=TOTAL, gb_per_s=draw([1, 2, 3]), fp16_tflops=1.0,
                int8_tops=1.0, price=1.0, watts=1.0, rates=draw([NO_RATES, rates_of(draw)]),
            ),
            total_bytes=TOTAL,
            free_bytes=reserved + workspace + draw(ROOMS),
            price=draw([1.0, 2.0, 5.0]),
        )
        for number in range(draw([2, 3, 4, 4]))
    )  # fmt: skip
    formats = draw(
        [("int3",), ("int4",), ("int8", "int4"), ("int3", "int4"), ("int3", "int4", "int8")]
    )
    first = draw(range(model.num_layers))
    pin = {"n:0": (first, draw(range(first + 1, model.num_layers + 1)))}
    mixes = tuple(
        {role: draw(MIX_FORMATS) for role in BLOCK_ROLES} for _ in range(model.num_layers)
    )
    mix = draw([None, None, mixes])
    return PlanRequest(
        model=model,
        inventory=Inventory(devices=devices),
        sequences=draw([1, 2, 3]),
        context=draw([1, 16, 33, 64]),
        formats=formats,
        is_mixed=draw([False, True]),
        head_format=draw(["auto", "auto", "bf16"]),
        kv_formats=draw([("auto",), ("int8",), ("auto", "int8")]),
        embedding_places=draw([("host",), ("device",), ("host", "device")]),
        min_bits=draw([0.0, 0.0, 3.4, 4.2]) if "int4" in formats and mix is None else 0.0,
        spare=draw(list(Spare)),
        objective=draw(list(Objective)),
        max_devices=draw([None, None, None, None, 2]),
        max_dollars=draw([None, None, None, None, 6.0]),
        pins=draw([{}, {}, {}, {}, pin]),
        mix=mix,
        max_batch_tokens=16,
        room_grain_bytes=1,
    )


requests = st.integers(0, 2**60).map(request_of)


def compositions(total, parts):
    for cuts in combinations(range(1, total), parts - 1):
        yield list(pairwise((0, *cuts, total)))


def every_way(request):
    """The best score of all ways, each tried; None if none fits. Plain, not fast."""
    scores = [
        score
        for level, (less, more) in enumerate(every_level(request))
        for place, kv in product(request.embedding_places, request.kv_formats)
        for score in ways(request, level, less, more, place, kv)
    ]
    return min(scores, default=None)


def every_level(request):
    """(Lesser format, better format), fewest bits first, of those with the bits that are asked."""
    model = request.model
    if request.mix is not None:
        yield "int4", "int4"  # neither counts
        return
    ranked = [name for name in ("int3", "int4", "int8") if name in request.formats]
    pairs = (
        pairwise(ranked)
        if request.is_mixed and len(ranked) > 1
        else zip(ranked, ranked, strict=True)
    )
    for less, more in pairs:
        if bits_per_weight(model, model_formats(model, more), [0]) >= request.min_bits:
            yield less, more


def ways(request, level, less, more, place, kv):
    """The score of each way that fits with some formats."""
    model, num_layers = request.model, request.model.num_layers
    variant = Variant(embedding_place=place, kv_format=kv)
    formats = {name: layer_formats(request, variant, name, "gpu") for name in (less, more)}
    lesser = [layer_bytes(model, formats[less], i) for i in range(num_layers)]
    step = layer_bytes(model, formats[more], 0) - lesser[0] if less != more else 0
    bits = {name: bits_per_weight(model, formats[name], [0]) for name in formats}
    ends = formats[more]
    vector = kv_vector_bytes(ends.kv, model.head_dim)
    block = request.block_size * 2 * model.num_kv_heads * vector
    workspace = max(
        workspace_bytes(model, formats[name], request.max_batch_tokens) for name in formats
    )
    need = request.sequences * -(-request.context // request.block_size)
    linears = {
        name: [layer_format_bytes(model, formats[name], i) for i in range(num_layers)]
        for name in formats
    }
    head = head_format_bytes(model, ends)
    first_held, last_read = embedding_bytes(model, ends), head_bytes(model, ends)
    last_held = {
        is_alone: head_bytes(model, ends, shared=is_alone and head_is_shared(model, ends))
        for is_alone in (False, True)
    }
    room_of = {
        d.device_id: request.inventory.usable(d) - workspace for d in request.inventory.devices
    }
    norms = [lesser[i] - sum(linears[less][i].values()) for i in range(num_layers)]
    for count in range(1, num_layers + 1):
        tokens = -(-request.sequences // min(count, request.sequences))
        for used in permutations(request.inventory.devices, count):
            cost = cost_of(request, used)
            if cost is None:
                continue
            for cut in compositions(num_layers, count):
                where = {d.device_id: run for d, run in zip(used, cut, strict=True)}
                if any(where.get(name) != run for name, run in request.pins.items()):
                    continue
                numbers = [range(end - first + 1) if less != more else [0] for first, end in cut]
                for better in product(*numbers):
                    total = sum(better)
                    mean = (total * bits[more] + (num_layers - total) * bits[less]) / num_layers
                    if request.mix is None and mean < request.min_bits - 1e-9:
                        continue
                    blocks, slowest = [], []
                    for device, (first, end), high in zip(used, cut, better, strict=True):
                        read = sum(lesser[first:end]) + high * step
                        held = read
                        if first == 0:
                            held += first_held
                        if end == num_layers:
                            held += last_held[first == 0]
                            read += last_read
                        read += need * block * (end - first)
                        room = room_of[device.device_id] - held
                        blocks.append(room // (block * (end - first)))
                        parts = [
                            linears[more if i < first + high else less][i]
                            for i in range(first, end)
                        ]
                        parts += [head] if end == num_layers else []
                        ns = read / device.type.gb_per_s
                        if ns_by_rates := measured_ns(device.type, parts, tokens):
                            rest = need * block * (end - first) + sum(norms[first:end])
                            if end == num_layers:
                                rest += last_read - sum(head.values())
                            ns = ns_by_rates + rest / device.type.gb_per_s
                        slowest.append(ns)
                    if min(blocks) >= need:
                        is_quality = request.spare is Spare.QUALITY
                        quality = (-level, -total) if is_quality else (0, 0)
                        yield cost, quality, -min(blocks), max(slowest)


def measured_ns(kind, parts, tokens):
    """Nanoseconds of linear layers by a kind's rates at 1 and 4 tokens; None: it has none."""
    if not kind.rates.by_format:
        return None
    total = 0
    for name, size in (item for part in parts for item in part.items()):
        (_, one), (_, four) = dict(kind.rates.by_format)[name]
        total += size * (one + (four - one) * (tokens - 1) / 3)
    return total


def cost_of(request, used):
    """What is to be least; None: it is more than was allowed."""
    dollars = sum(device.price for device in used)
    if request.max_devices is not None and len(used) > request.max_devices:
        return None
    if request.max_dollars is not None and dollars > request.max_dollars:
        return None
    if request.objective is Objective.DEVICES:
        return len(used), 0
    return dollars * 1_000_000, len(used)


def check(request):
    best = every_way(request)
    for many in (0, 10**9):  # by either search, where either can
        with patch.object(packing, "MANY_STATES", many):
            found = solve(request)
        assert (found is None) == (best is None)
        if found is not None:
            assert tuple(found.score)[:3] == best[:3]
            # Each part's time is rounded up.
            assert best[3] <= found.score.slowest_ns + 1e-3
            assert found.score.slowest_ns <= best[3] + 3 * request.model.num_layers + 3
            check_runs(request, found)


def check_runs(request, found):
    # What it says of itself is so: the stages hold every layer once, with room for the blocks.
    runs = found.runs
    assert [run.first for run in runs] == [0, *(run.end for run in runs[:-1])]
    assert runs[-1].end == request.model.num_layers
    assert min(found.packer.spare_blocks(run) for run in runs) == found.kv_blocks
    assert max(found.packer.stage_ns(run) for run in runs) == found.score.slowest_ns


@given(request=requests)
@settings(max_examples=150, deadline=None)
def test_no_way_at_all_is_better_than_the_plan(request):
    check(request)


@pytest.mark.slow
@given(request=requests)
@settings(max_examples=2500, deadline=None)
def test_no_way_at_all_is_better_than_the_plan_in_thousands_of_cases(request):
    check(request)


def test_in_many_of_these_cases_measured_rates_decide_and_fewer_bits_are_slower_in_some():
    requests = [request_of(seed) for seed in range(200)]
    unmeasured = [
        replace(
            request,
            inventory=Inventory(
                devices=tuple(
                    replace(device, type=replace(device.type, rates=NO_RATES))
                    for device in request.inventory.devices
                )
            ),
        )
        for request in requests
    ]
    pairs = [(solve(a), solve(b)) for a, b in zip(requests, unmeasured, strict=True)]
    found = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert sum(a.score.slowest_ns != b.score.slowest_ns for a, b in found) > 30
    assert sum(a.runs != b.runs for a, b in found) > 5
    assert sum(min(a.packer.better_ns) < 0 for a, _ in found) > 5


def test_many_of_these_cases_take_one_stage_many_take_several_and_many_do_not_fit():
    found = [solve(request_of(seed)) for seed in range(200)]
    stages = [0 if one is None else len(one.runs) for one in found]
    assert min(stages.count(0), stages.count(1), stages.count(2)) > 30
    assert stages.count(3) + stages.count(4) > 5

"""Simulated serving: exact where a pipeline can be worked out by hand, sound everywhere."""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.inventory import CONFIGS, read_inventory
from tightfit.cluster.planning.request import PlanRequest
from tightfit.cluster.scheduling.batching import SchedulerConfig
from tightfit.cluster.settings import read_yaml
from tightfit.cluster.simulation import Load, SimulatedStage, Spread, simulate, simulate_plan
from tightfit.workers.decoder_config import decoder_config

ROOMY = SchedulerConfig(num_blocks=4096, max_context_tokens=4096)


def stages(*seconds, link_s=0.0):
    """Each takes so long, whatever the micro-batch. Powers of two add up without rounding."""
    return [
        SimulatedStage(step_s=lambda batch, s=s: s, link_s=lambda batch: link_s) for s in seconds
    ]


def load(streams, output, *, prompt=1, requests=None):
    return Load(streams=streams, prompt=prompt, output=output, requests=requests or streams)


def test_one_stream_on_one_stage_takes_a_step_for_each_token():
    found = simulate(stages(0.25), load(1, 40), ROOMY)
    assert (found.elapsed_s, found.tokens_per_s) == (10.0, 4.0)
    assert found.ttft == found.itl == Spread(mean_s=0.25, p50_s=0.25, p99_s=0.25)
    assert (found.busy, found.micro_batches, found.preemptions) == ((1.0,), 40, 0)


def test_one_stream_on_three_stages_waits_for_each_and_for_every_link_and_for_the_control_plane():
    found = simulate(
        stages(0.125, 0.5, 0.25, link_s=0.0625), load(1, 33), ROOMY, return_s=0.03125,
        control_s=0.015625,
    )  # fmt: skip
    round_s = 0.875 + 3 * 0.0625 + 0.03125
    assert found.ttft.mean_s == round_s
    assert found.itl.mean_s == found.itl.p99_s == round_s + 0.015625
    assert found.elapsed_s == 33 * round_s + 32 * 0.015625
    assert found.busy == tuple(33 * s / found.elapsed_s for s in (0.125, 0.5, 0.25))


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_as_many_streams_as_equal_stages_keep_all_of_them_busy(num_stages):
    output = 100
    found = simulate(stages(*[1.0] * num_stages), load(num_stages, output), ROOMY)
    # All prompts pass in the first micro-batch; then each stream has one of its own, and its n-th
    # token comes a round later than the one before.
    assert found.elapsed_s == num_stages * output + num_stages - 1
    assert found.itl.p50_s == num_stages
    for busy in found.busy:
        assert busy == (1 + num_stages * (output - 1)) / found.elapsed_s


def test_the_slowest_stage_is_the_limit_of_a_full_pipeline():
    found = simulate(stages(1.0, 4.0, 2.0), load(3, 200), ROOMY)
    assert found.tokens_per_s == pytest.approx(1 / 4, rel=0.02)
    assert found.busy[1] > 0.98
    assert found.busy[0] == pytest.approx(found.busy[1] / 4, rel=0.02)
    assert found.busy[2] == pytest.approx(found.busy[1] / 2, rel=0.02)


def test_a_control_plane_that_is_slower_than_every_stage_is_the_limit():
    found = simulate(stages(0.5, 0.5), load(8, 200), ROOMY, control_s=2.0)
    assert found.elapsed_s == pytest.approx(2.0 * found.micro_batches, rel=0.01)


def test_every_token_of_every_request_is_computed_once_and_every_output_meets_the_head():
    shapes = []

    def step_s(batch):
        shapes.append(batch)
        return 1e-3 * batch.tokens

    found = simulate(
        [SimulatedStage(step_s=step_s, link_s=lambda batch: 0.0)],
        load(5, 7, prompt=600, requests=12),
        ROOMY,
    )
    assert sum(batch.tokens for batch in shapes) == 12 * (600 + 7 - 1)
    assert sum(batch.rows for batch in shapes) == 12 * 7
    assert max(batch.rows for batch in shapes) <= 5
    assert max(batch.tokens for batch in shapes) == ROOMY.max_batch_tokens
    # The last step of a sequence reads the keys and values of all its tokens but the last.
    assert max(batch.kv_tokens for batch in shapes if batch.rows == 1) >= 606
    assert found.busy == (pytest.approx(1.0),)
    assert found.elapsed_s == pytest.approx(12 * 606e-3)


def test_a_small_kv_cache_delays_requests_and_loses_none():
    tight = SchedulerConfig(num_blocks=12, max_context_tokens=4096)
    roomy = simulate(stages(1.0, 1.0), load(8, 60, prompt=30), ROOMY)
    found = simulate(stages(1.0, 1.0), load(8, 60, prompt=30), tight)
    assert found.elapsed_s > 1.5 * roomy.elapsed_s
    assert found.ttft.p99_s > 10 * roomy.ttft.p99_s


def test_a_request_longer_than_the_cache_or_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"of 100 \+ 93 tokens is longer than the 192"):
        simulate(stages(1.0), load(1, 93, prompt=100), SchedulerConfig(
            num_blocks=12, max_context_tokens=4096,
        ))  # fmt: skip


times = st.floats(0.001, 1.0)


@given(
    seconds=st.lists(times, min_size=1, max_size=4), link_s=st.floats(0.0, 0.5),
    streams=st.integers(1, 12), requests=st.integers(1, 20), prompt=st.integers(1, 200),
    output=st.integers(1, 30), control_s=st.floats(0.0, 0.1),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_no_load_is_served_faster_than_its_slowest_part_and_the_same_load_always_alike(
    seconds, link_s, streams, requests, prompt, output, control_s
):
    asked = Load(streams=streams, prompt=prompt, output=output, requests=requests)
    runs = [
        simulate(stages(*seconds, link_s=link_s), asked, ROOMY, control_s=control_s)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    found = runs[0]
    assert found.elapsed_s * (1 + 1e-9) >= found.micro_batches * max(seconds)
    assert found.elapsed_s >= output * (sum(seconds) + link_s * len(seconds)) * (1 - 1e-9)
    assert max(found.busy) <= 1 + 1e-9
    assert found.itl.mean_s <= found.elapsed_s


def test_percentiles_are_of_times_that_occurred():
    found = Spread.of([float(Fraction(n, 4)) for n in range(200, 0, -1)])
    assert (found.mean_s, found.p50_s, found.p99_s) == (25.125, 25.0, 49.5)
    assert Spread.of([]) == Spread(mean_s=0.0, p50_s=0.0, p99_s=0.0)


# -- plans -----------------------------------------------------------------------------------


def planned(inventory, **options):
    model = decoder_config(read_yaml(CONFIGS / "models" / "bloom-176b.yaml"))
    devices = read_inventory(CONFIGS / "inventories" / f"{inventory}.yaml")
    return make_plan("m", PlanRequest(model=model, inventory=devices, **options))


def test_a_stream_of_a_plan_has_the_time_for_a_token_that_the_plan_predicts():
    plan = planned("8xa100-80", context=64)
    found = simulate_plan(plan, load(1, 60, prompt=4), max_context_tokens=2048)
    assert found.itl.p99_s == pytest.approx(plan.token_s, rel=1e-3)  # all but the last block's
    assert found.itl.p50_s < plan.token_s


def test_a_full_pipeline_of_a_plan_gives_the_tokens_that_the_plan_predicts():
    plan = planned("mixed-lot", sequences=16, context=128, formats=("int4",))
    assert len(plan.stages) >= 3
    found = simulate_plan(plan, load(16, 120, prompt=8), max_context_tokens=2048)
    assert found.tokens_per_s == pytest.approx(plan.tokens_per_s, rel=0.1)
    times = plan.step_s(4)
    slowest = found.busy[times.index(max(times))]  # another may be as slow within a percent
    assert slowest == pytest.approx(max(found.busy), rel=0.01)

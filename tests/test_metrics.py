"""The metrics as Prometheus reads them."""

import shutil
import subprocess
import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tightfit.cluster.metrics import HEALTH_STATES, Metrics, MetricsServer
from tightfit.cluster.request import FinishReason, Recovery, RequestRecord
from tightfit.cluster.scheduling.batching import SchedulerCounts
from tightfit.workers.api import StageMemory, StageStatus


def counts(**changes):
    zero = dict.fromkeys(SchedulerCounts.__dataclass_fields__, 0)
    return SchedulerCounts(**{**zero, "num_blocks": 10, **changes})


def stage(**changes):
    memory = StageMemory(
        predicted_weight_bytes=100, weight_bytes=101, kv_cache_bytes=50, workspace_bytes=7,
        rss_anon_bytes=200, budget_bytes=None, num_kv_blocks=25,
    )  # fmt: skip
    return StageStatus(
        **{
            "stage_index": 0, "first_layer": 0, "end_layer": 4, "format": "int8",
            "kv_format": "bf16", "device": "cpu", "node_id": "n", "pid": 1, "epoch": 1, "steps": 3,
            "busy_s": 1.0, "uptime_s": 4.0, "memory": memory, **changes,
        }
    )  # fmt: skip


def record(**changes):
    times = {"started_s": 5.0, "tokenized_s": 5.1, "admitted_s": 5.2, "first_token_s": 5.3}
    return RequestRecord(
        **{
            **times, "request_id": "r", "method": "Generate", "finish_reason": FinishReason.STOP,
            "ended_s": 5.7, "num_prompt_tokens": 20, "num_cached_tokens": 16,
            "num_generated_tokens": 8, "num_sequences": 1, **changes,
        }
    )  # fmt: skip


@pytest.fixture
def registry():
    return CollectorRegistry()


def value(registry, name, **labels):
    return registry.get_sample_value(f"tightfit_{name}", labels)


def test_every_series_of_a_fixed_set_exists_before_anything_happened(registry):
    Metrics(registry, num_stages=2)
    assert value(registry, "num_requests_running") == 0
    assert value(registry, "requests_total", finished_reason="deadline") == 0
    assert value(registry, "stage_busy_seconds_total", stage="1") == 0
    assert value(registry, "time_to_first_token_seconds_count") == 0
    assert value(registry, "health_state", state="recovering") == 0
    for name in ("recoveries_total", "replayed_tokens_total", "recovery_seconds_count"):
        assert value(registry, name) == 0


def test_overhead_is_wall_time_less_the_forwards_and_shared_among_stages(registry):
    metrics = Metrics(registry)
    metrics.observe_step(wall_s=0.010, forward_s=[0.004, 0.0055])
    assert value(registry, "step_overhead_seconds_sum") == pytest.approx(0.0005)
    assert value(registry, "step_overhead_per_stage_seconds_sum") == pytest.approx(0.00025)
    assert value(registry, "step_overhead_per_stage_seconds_bucket", le="0.0003") == 1
    assert value(registry, "stage_busy_seconds_total", stage="1") == pytest.approx(0.0055)


def test_a_step_that_met_another_counts_as_busy_time_but_not_as_overhead(registry):
    metrics = Metrics(registry)
    metrics.observe_step(wall_s=0.030, forward_s=[0.004, 0.004], alone=False)
    assert value(registry, "step_overhead_seconds_count") == 0
    assert value(registry, "step_seconds_count") == 1
    assert value(registry, "stage_busy_seconds_total", stage="0") == pytest.approx(0.004)


def test_totals_of_the_scheduler_become_counters_that_never_fall(registry):
    metrics = Metrics(registry)
    for total in (2, 2, 5):
        metrics.set_counts(counts(num_running=3, num_blocks_used=5, num_preemptions=total))
    assert value(registry, "num_preemptions_total") == 5
    assert value(registry, "num_requests_running") == 3
    assert value(registry, "kv_cache_usage_ratio") == 0.5
    metrics.set_counts(counts(num_preemptions=1, num_prompt_tokens=20, num_generated_tokens=7))
    assert value(registry, "num_preemptions_total") == 6
    assert value(registry, "prompt_tokens_total") == 20
    assert value(registry, "generation_tokens_total") == 7


def test_an_ended_request_counts_its_reason_and_a_refused_one_its_status(registry):
    metrics = Metrics(registry)
    metrics.count_finished(record())
    metrics.count_refused("RESOURCE_EXHAUSTED")
    assert value(registry, "requests_total", finished_reason="stop") == 1
    assert value(registry, "e2e_request_latency_seconds_sum") == pytest.approx(0.7)
    assert value(registry, "request_prefill_time_seconds_sum") == pytest.approx(0.1)
    assert value(registry, "request_decode_time_seconds_sum") == pytest.approx(0.4)
    assert value(registry, "request_prompt_tokens_sum") == 20
    assert value(registry, "request_generation_tokens_bucket", le="8.0") == 1
    assert value(registry, "request_generation_tokens_bucket", le="4.0") == 0
    assert value(registry, "requests_refused_total", status="RESOURCE_EXHAUSTED") == 1


def test_every_metric_has_the_prefix_a_help_text_and_base_units(registry):
    Metrics(registry)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) > 20
    for family in families:
        assert family.name.startswith("tightfit_")
        assert family.documentation.endswith(".")
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb"))


def test_two_services_in_one_process_do_not_share_metrics():
    first, second = CollectorRegistry(), CollectorRegistry()
    Metrics(first).observe_first_token(0.1)
    Metrics(second)
    assert value(first, "time_to_first_token_seconds_count") == 1
    assert value(second, "time_to_first_token_seconds_count") == 0


def test_prometheus_can_scrape_until_the_server_is_closed(registry):
    Metrics(registry).observe_first_token(0.1)
    server = MetricsServer(registry, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert "tightfit_time_to_first_token_seconds_count 1.0" in answer.read().decode()
    server.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_a_request_that_never_ran_has_neither_prefill_nor_decode(registry):
    metrics = Metrics(registry)
    metrics.count_finished(
        record(finish_reason=FinishReason.DEADLINE, admitted_s=None, first_token_s=None)
    )
    assert value(registry, "requests_total", finished_reason="deadline") == 1
    assert value(registry, "request_prefill_time_seconds_count") == 0
    assert value(registry, "request_decode_time_seconds_count") == 0


def test_a_recovery_counts_with_its_time_and_what_had_to_be_computed_again(registry):
    metrics = Metrics(registry)
    for epoch, took_s, num_tokens in ((2, 12.5, 300), (3, 0.75, 0)):
        metrics.observe_recovery(
            Recovery(epoch=epoch, reason="stage 1's process ended", lost_s=100.0 * epoch,
                     resumed_s=100.0 * epoch + took_s, num_replayed_tokens=num_tokens)
        )  # fmt: skip
    assert value(registry, "recoveries_total") == 2
    assert value(registry, "replayed_tokens_total") == 300
    assert value(registry, "recovery_seconds_sum") == pytest.approx(13.25)
    shares = {
        le: value(registry, "recovery_seconds_bucket", le=le) for le in ("0.5", "1.0", "20.0")
    }
    assert shares == {"0.5": 0, "1.0": 1, "20.0": 2}


def test_the_health_is_one_of_a_fixed_set_of_states(registry):
    metrics = Metrics(registry)
    for state in HEALTH_STATES:
        metrics.set_health(state, epoch=3, num_in_flight=2)
        shown = {s: value(registry, "health_state", state=s) for s in HEALTH_STATES}
        assert shown == {s: float(s == state) for s in HEALTH_STATES}
    assert value(registry, "replica_epoch") == 3
    assert value(registry, "num_micro_batches_in_flight") == 2


def test_a_stage_that_moved_does_not_leave_its_old_self_behind(registry):
    metrics = Metrics(registry, num_stages=1)
    for node in ("a", "b"):
        metrics.set_stages([stage(node_id=node)])
    labels = {"stage": "0", "device": "cpu", "format": "int8", "kv_format": "bf16"}
    assert value(registry, "stage_info", node="a", **labels) is None
    assert value(registry, "stage_info", node="b", **labels) == 1
    assert value(registry, "stage_layers", stage="0") == 4
    assert value(registry, "stage_memory_bytes", stage="0") == 101 + 50 + 7
    assert value(registry, "stage_memory_budget_bytes", stage="0") is None


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_finds_nothing_to_say_about_names_units_and_help_texts(registry):
    metrics = Metrics(registry, num_stages=3)
    metrics.set_stages([stage()])
    done = subprocess.run(
        ["promtool", "check", "metrics"], input=generate_latest(registry), capture_output=True
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")

"""The metrics as Prometheus reads them."""

import urllib.request

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tightfit.cluster.metrics import Metrics, MetricsServer
from tightfit.cluster.request import FinishReason
from tightfit.cluster.scheduling.batching import SchedulerCounts


def counts(**changes):
    zero = dict.fromkeys(SchedulerCounts.__dataclass_fields__, 0)
    return SchedulerCounts(**{**zero, "num_blocks": 10, **changes})


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
    metrics.count_finished(FinishReason.STOP, e2e_s=0.7)
    metrics.count_refused("RESOURCE_EXHAUSTED")
    assert value(registry, "requests_total", finished_reason="stop") == 1
    assert value(registry, "e2e_request_latency_seconds_sum") == pytest.approx(0.7)
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

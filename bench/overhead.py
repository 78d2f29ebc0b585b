"""What a pipeline step costs beside its stages' forwards, at one stream.

`python bench/overhead.py`. From the service's own histogram of overhead per stage, read before and
after a load; for one stage and for two. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import urllib.request
from itertools import pairwise
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

METRIC = "tightfit_step_overhead_per_stage_seconds"
REQUESTS = 3
TOKENS = 128
TARGET_S = 0.5e-3
STAGES = (1, 2)


def scrape(address: str) -> tuple[dict[float, float], float]:
    """The histogram now: steps at or below each bound in seconds, and the sum in seconds."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    buckets, total = {}, 0.0
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{METRIC}_bucket":
                buckets[float(sample.labels["le"])] = sample.value
            elif sample.name == f"{METRIC}_sum":
                total = sample.value
    if not buckets:
        raise SystemExit(f"{address} has no metric {METRIC}")
    return buckets, total


def quantile(cumulative: dict[float, float], share: float) -> tuple[float, float]:
    """Bounds, in seconds, of the bucket that holds the quantile; the upper may be infinite."""
    bounds = [0.0, *sorted(cumulative)]
    wanted = share * cumulative[math.inf]
    return next((low, high) for low, high in pairwise(bounds) if cumulative[high] >= wanted)


def interpolated(cumulative: dict[float, float], share: float) -> float:
    """The quantile in seconds, as Prometheus' histogram_quantile takes it: straight lines within a
    bucket; the lower bound in the last."""
    low, high = quantile(cumulative, share)
    if math.isinf(high):
        return low
    below = cumulative.get(low, 0.0)
    part = (share * cumulative[math.inf] - below) / (cumulative[high] - below)
    return low + part * (high - low)


def measure(num_stages: int) -> dict[str, object]:
    """Overhead per step and stage, in milliseconds, of a service with so many stages."""
    metrics = f"127.0.0.1:{harness.free_port()}"
    threads = max(1, harness.THREADS // num_stages)
    with harness.Service(
        "--stages", str(num_stages), "--threads-per-stage", str(threads), "--format", "int8",
        "--metrics-listen", metrics,
    ) as service:  # fmt: skip
        service.load(streams=1, tokens=16, seed=1)
        harness.settle()
        before, before_sum = scrape(metrics)
        for seed in range(REQUESTS):
            service.load(streams=1, tokens=TOKENS, seed=seed)
        after, after_sum = scrape(metrics)
    steps = {bound: after[bound] - before[bound] for bound in after}
    count = steps[math.inf]
    if count < REQUESTS * TOKENS / 2:
        raise SystemExit(f"only {count:.0f} steps were counted in {METRIC}")
    return {
        "steps": int(count),
        "p50_ms": 1000 * interpolated(steps, 0.5),
        "p50_between_ms": [1000 * bound for bound in quantile(steps, 0.5)],
        "p90_ms": 1000 * interpolated(steps, 0.9),
        "mean_ms": 1000 * (after_sum - before_sum) / count,
        "target_ms": 1000 * TARGET_S,
    }


def measure_all() -> dict[str, dict[str, object]]:
    """By number of stages."""
    return {f"{n} stage{'s' if n > 1 else ''}": measure(n) for n in STAGES}


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(json.dumps(measure_all(), indent=1))

"""What watching a service costs: metrics scraped, every request traced and logged, the live page
open.

`python bench/observability.py`. Two services of the same model run side by side, one watched, one
not, and take turns at the same load, so that a slow minute of the machine hits both alike. The
watcher itself (scraper, collector of traces, browser's questions) runs on the same cores. Also the
time of what is always counted, in a loop. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from prometheus_client import CollectorRegistry

from tightfit.cluster.metrics import Metrics
from tightfit.cluster.scheduling.config import SchedulerCounts

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

STREAMS, TOKENS = 16, 32
SCRAPE_S = 1.0
STAGES = 2
LOOPS = 5000


@contextmanager
def collector() -> Iterator[tuple[str, list[int]]]:
    """An OTLP collector on loopback that throws away what it gets: its address, and how many
    spans came."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services

    spans: list[int] = []

    class Collector(services.TraceServiceServicer):
        def Export(self, request, context):
            spans.extend(
                len(scope.spans) for group in request.resource_spans for scope in group.scope_spans
            )
            return messages.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(2))
    services.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}", spans
    finally:
        server.stop(grace=None).wait()


@contextmanager
def watching(*urls: str) -> Iterator[None]:
    """Ask each once a second, as Prometheus (which asks far less often) and a browser do."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SCRAPE_S):
            for url in urls:
                with urllib.request.urlopen(url, timeout=10) as answer:
                    answer.read()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def tokens_per_s(service: harness.Service, seed: int) -> float:
    """Of one load, by the clients' clock."""
    started = time.perf_counter()
    service.load(streams=STREAMS, tokens=TOKENS, seed=seed)
    return STREAMS * TOKENS / (time.perf_counter() - started)


def paired(pairs: int) -> dict[str, object]:
    """Throughput watched over unwatched, a ratio for each pair of loads."""
    metrics, live = (f"127.0.0.1:{harness.free_port()}" for _ in range(2))
    common = ("--stages", str(STAGES), "--threads-per-stage", "1", "--format", "int8")
    plain: list[float] = []
    watched: list[float] = []
    with collector() as (endpoint, spans):
        seen = (
            "--metrics-listen", metrics, "--live-listen", live, "--trace-endpoint", endpoint,
            "--log-level", "info", "--log-format", "json",
        )  # fmt: skip
        with harness.Service(*common) as off, harness.Service(*common, *seen) as on:
            for service in (off, on):
                tokens_per_s(service, seed=0)  # warm
            busy = harness.settle()
            for pair in range(1, pairs + 1):
                turns = [(off, plain), (on, watched)]
                for service, rates in turns if pair % 2 else reversed(turns):
                    if service is off:
                        rates.append(tokens_per_s(service, pair))
                        continue
                    with watching(f"http://{metrics}/metrics", f"http://{live}/live.json"):
                        rates.append(tokens_per_s(service, pair))
                print(f"pair {pair}: {plain[-1]:.1f}, {watched[-1]:.1f} tokens/s", file=sys.stderr)
        time.sleep(6)  # the last batch of spans
        if sum(spans) < (pairs + 1) * STREAMS:
            raise SystemExit(f"only {sum(spans)} spans came")
    ratios = [w / p for w, p in zip(watched, plain, strict=True)]
    low, high = interval(ratios)
    return {
        "pairs": pairs,
        "busy_before": round(busy, 2),
        "plain_tokens_per_s": round(statistics.median(plain), 1),
        "watched_tokens_per_s": round(statistics.median(watched), 1),
        "ratio": round(statistics.mean(ratios), 4),
        "ratio_95": [round(low, 4), round(high, 4)],
    }


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the mean ratio, 95 %, by resampling."""
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return means[100], means[-101]


def counting() -> dict[str, float]:
    """Microseconds of what is counted always, watched or not: for each step, and each token."""
    metrics = Metrics(CollectorRegistry(), num_stages=STAGES)
    fields = dict.fromkeys(SchedulerCounts.__dataclass_fields__, 1)
    counts = SchedulerCounts(**fields)

    def each(work) -> float:
        started = time.perf_counter()
        for _ in range(LOOPS):
            work()
        return round(1e6 * (time.perf_counter() - started) / LOOPS, 1)

    def step() -> None:
        metrics.observe_step(wall_s=0.01, forward_s=[0.004, 0.004])
        metrics.set_counts(counts)

    return {"step_us": each(step), "token_us": each(lambda: metrics.observe_inter_token(0.01))}


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20, help="loads of each service")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)  # so that services are ended then, too
    figures = {"machine": harness.machine(), "counting": counting(), "watched": paired(args.pairs)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

"""What watching a service costs: metrics scraped, every request traced, the live page open.

`python bench/observability.py`. One service meets the same load again and again, now watched and
now not, in an order by lot: two services of one model, side by side, differ by more than what is
sought, and a slow minute of the machine hits all sides alike. The watcher itself (scraper,
collector of traces, browser's questions) runs on the same cores. What is done whether somebody
watches or not is timed in a loop: what is counted, and the line that is logged of a request; so is
what is finer than the loads can tell: a request's trace, and an answer to who asks.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import grpc
import psutil
from prometheus_client import CollectorRegistry

from tightfit.cluster.gateway.watch import log_fields
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.request import FinishReason, RequestRecord
from tightfit.cluster.scheduling.config import SchedulerCounts
from tightfit.cluster.tracing import Tracing, otlp_exporter
from tightfit.workers.logs import JsonFormatter

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

STREAMS, TOKENS = 16, 64
SCRAPE_S = 1.0
STAGES = 2
LOOPS = 5000
ASKED, TRACED = 100, 1000


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


class Side(NamedTuple):
    """One way of watching, or of not watching, the one service."""

    is_traced: bool
    urls: tuple[str, ...]
    """What is asked every second meanwhile."""


class Turn(NamedTuple):
    """What one load came to."""

    tokens_per_s: float
    """By the clients' clock."""
    cpu_s: float
    """Of the service's processes, stages included."""


def one_turn(service: harness.Service, side: Side, seed: int) -> Turn:
    """One load, watched as the side says. A caller's `traceparent` decides whether it is traced."""
    trace = f"00-{seed + 1:032x}-{1:016x}-0{int(side.is_traced)}"
    processes = family(service)
    before = cpu_s(processes)
    with watching(*side.urls):
        started = time.perf_counter()
        service.load(
            streams=STREAMS, tokens=TOKENS, seed=seed,
            options={"metadata": [("traceparent", trace)]},
        )  # fmt: skip
        wall_s = time.perf_counter() - started
    return Turn(STREAMS * TOKENS / wall_s, cpu_s(processes) - before)


def family(service: harness.Service) -> list[psutil.Process]:
    """The service's processes, stages included."""
    process = psutil.Process(service.pid)
    return [process, *process.children(recursive=True)]


def cpu_s(processes: Iterable[psutil.Process]) -> float:
    """That they have had, in seconds."""
    times = [process.cpu_times() for process in processes]
    return sum(each.user + each.system for each in times)


def watched(rounds: int) -> dict[str, object]:
    """Each way of watching over not watching, a ratio for each round; and not watching over not
    watching, which tells how far to trust the others."""
    metrics, live = (f"127.0.0.1:{harness.free_port()}" for _ in range(2))
    scrape, draw = f"http://{metrics}/metrics", f"http://{live}/live.json"
    sides = {
        "plain": Side(False, ()),
        "plain again": Side(False, ()),
        "scraped and traced": Side(True, (scrape,)),
        "scraped, traced and drawn": Side(True, (scrape, draw)),
    }
    turns: dict[str, list[Turn]] = {name: [] for name in sides}
    order = random.Random(0)
    with collector() as (endpoint, spans):
        flags = (
            "--stages", str(STAGES), "--threads-per-stage", "1", "--format", "int8",
            "--metrics-listen", metrics, "--live-listen", live, "--trace-endpoint", endpoint,
            "--log-level", "info", "--log-format", "json",
        )  # fmt: skip
        with harness.Service(*flags) as service:
            one_turn(service, sides["plain"], 0)  # warm
            busy = harness.settle()
            for number in range(1, rounds + 1):
                for name in order.sample(list(sides), len(sides)):
                    turns[name].append(one_turn(service, sides[name], number))
                shown = ", ".join(f"{name} {turns[name][-1].tokens_per_s:.1f}" for name in sides)
                print(f"round {number}, tokens/s: {shown}", file=sys.stderr)
            asked = {
                name: asking(service, url) for name, url in (("scrape", scrape), ("draw", draw))
            }
        time.sleep(6)  # the last batch of spans
    if sum(spans) != 2 * rounds * STREAMS:
        raise SystemExit(f"{sum(spans)} spans came, not {2 * rounds * STREAMS}")
    return {
        "rounds": rounds,
        "busy_before": round(busy, 2),
        "plain_tokens_per_s": round(statistics.median(t.tokens_per_s for t in turns["plain"]), 1),
        "cpu_ms_each": asked,
        "over_plain": {name: compared(turns, name) for name in sides if name != "plain"},
    }


def asking(service: harness.Service, url: str) -> float:
    """Milliseconds of CPU that the service's processes take to answer once, beyond what they take
    when nobody asks."""
    processes = family(service)
    started, before = time.monotonic(), cpu_s(processes)
    for _ in range(ASKED):
        with urllib.request.urlopen(url, timeout=10) as answer:
            answer.read()
        time.sleep(0.05)
    wall_s, busy_s = time.monotonic() - started, cpu_s(processes) - before
    before = cpu_s(processes)
    time.sleep(wall_s)
    return round(1000 * (busy_s - (cpu_s(processes) - before)) / ASKED, 2)


def compared(turns: dict[str, list[Turn]], name: str) -> dict[str, object]:
    """One side over those that nobody watched, by rounds: tokens per second, and CPU time."""
    others = ["plain"] if name == "plain again" else ["plain", "plain again"]
    base = list(zip(*(turns[other] for other in others), strict=True))
    found = {}
    for field in Turn._fields:
        means = [statistics.mean(getattr(turn, field) for turn in each) for each in base]
        ratios = [getattr(t, field) / mean for t, mean in zip(turns[name], means, strict=True)]
        low, high = interval(ratios)
        found[field] = {
            "ratio": round(statistics.mean(ratios), 4),
            "ratio_95": [round(low, 4), round(high, 4)],
        }
    return found


def interval(ratios: list[float]) -> tuple[float, float]:
    """Of the mean ratio, 95 %, by resampling."""
    draw = random.Random(0)
    means = sorted(statistics.mean(draw.choices(ratios, k=len(ratios))) for _ in range(4000))
    return means[100], means[-101]


def counting() -> dict[str, float]:
    """Microseconds of what is done whether somebody watches or not: what is counted for each step
    and each token, and the JSON line that is logged of a request."""
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

    return {
        "step_us": each(step),
        "token_us": each(lambda: metrics.observe_inter_token(0.01)),
        "request_line_us": each(request_line()),
        "request_trace_us": request_trace(),
    }


def request_trace() -> float:
    """Microseconds of CPU that a request's span takes, sent to a collector in another process."""
    with collector_process() as endpoint:
        tracing = Tracing(otlp_exporter(endpoint), model="bench", version="0")
        record, before = finished(), time.process_time()
        for _ in range(TRACED):
            tracing.export(record, ())
        tracing.close()
        return round(1e6 * (time.process_time() - before) / TRACED, 1)


@contextmanager
def collector_process() -> Iterator[str]:
    """`collector` in a process of its own; its address."""
    code = (
        "import observability, sys\nwith observability.collector() as (address, _):\n"
        "    print(address, flush=True)\n    sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


def request_line() -> Callable[[], None]:
    """Logs a finished request, to nowhere."""
    record = finished()
    log = logging.getLogger("tightfit.bench")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(os.devnull)
    handler.setFormatter(JsonFormatter({}))
    log.addHandler(handler)
    return lambda: log.info("finished", extra=log_fields(record))


def finished() -> RequestRecord:
    """A request, as it is told of."""
    return RequestRecord(
        request_id="r-1", method="GenerateStream", finish_reason=FinishReason.LENGTH,
        started_s=1.0, tokenized_s=1.001, admitted_s=1.01, first_token_s=1.1, ended_s=2.0,
        num_prompt_tokens=20, num_cached_tokens=0, num_generated_tokens=TOKENS, num_sequences=1,
        recomputed_s=(), client="bench",
    )  # fmt: skip


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="loads of each side")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)  # so that services are ended then, too
    figures = {
        "machine": harness.machine(),
        "counting": counting(),
        "watched": watched(args.rounds),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

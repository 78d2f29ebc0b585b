"""Every metric of the service, each defined once, for Prometheus to scrape.

Names and meanings are vLLM's where it has the same metric; all begin with `tightfit_`, in base
units. Methods take plain numbers, so callers know nothing of Prometheus. All are thread-safe.

There is one endpoint, the gateway's. What stages measure comes to it in two ways: the time that
each computed with every step's result, and what it holds with the status that `monitor` asks for.
No label takes its value from a request, so the number of stages decides the number of series.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from tightfit.cluster.errors import statuses
from tightfit.cluster.request import FinishReason, Recovery, RequestRecord
from tightfit.cluster.scheduling.batching import SchedulerCounts
from tightfit.workers.api import StageStatus

FIRST_TOKEN_BUCKETS_S = (
    0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
INTER_TOKEN_BUCKETS_S = (
    0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2,
    0.3, 0.5, 0.75, 1.0, 2.5, 5.0,
)  # fmt: skip
REQUEST_BUCKETS_S = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0,
)  # fmt: skip
OVERHEAD_BUCKETS_S = (
    50e-6, 100e-6, 150e-6, 200e-6, 250e-6, 300e-6, 400e-6, 500e-6, 600e-6, 800e-6, 1e-3, 1.5e-3,
    2e-3, 3e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 500e-3,
)  # fmt: skip
STEP_BUCKETS_S = (
    1e-3, 2e-3, 4e-3, 6e-3, 8e-3, 10e-3, 12e-3, 15e-3, 20e-3, 30e-3, 50e-3, 75e-3, 100e-3, 200e-3,
    500e-3, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
RECOVERY_BUCKETS_S = (
    0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0,
    1200.0, 1800.0,
)  # fmt: skip
TOKEN_BUCKETS = tuple(2**power for power in range(18))
HEALTH_STATES = ("ok", "idle", "stalled", "recovering", "failed", "draining")


class Metrics:
    """The service's metrics on one registry.

    Args:
        registry: where they are registered; one `Metrics` per registry.
        num_stages: stages of the pipeline, whose series exist from the start.
    """

    def __init__(self, registry: CollectorRegistry, *, num_stages: int = 0) -> None:
        self._registry = registry
        self._define_requests()
        self._define_scheduler()
        self._define_pipeline()
        self._define_deployment()
        self._define_recoveries()
        self._define_stages()
        self._busy_of: list[Counter] = []
        """By stage: looking a label up takes longer than counting."""
        self._expect_stages(num_stages)
        self._totals: dict[Counter, int] = {}

    def _expect_stages(self, number: int) -> None:
        for stage in range(len(self._busy_of), number):
            self._busy_of.append(self._stage_busy.labels(str(stage)))

    # -- definitions -------------------------------------------------------------------------

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"tightfit_{name}", help, buckets=buckets, registry=self._registry)

    def _gauge(self, name: str, help: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"tightfit_{name}", help, labels, registry=self._registry)

    def _counter(self, name: str, help: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(f"tightfit_{name}", help, labels, registry=self._registry)

    def _define_requests(self) -> None:
        self._first_token = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            FIRST_TOKEN_BUCKETS_S,
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds",
            "Between consecutive tokens of one sequence.",
            INTER_TOKEN_BUCKETS_S,
        )
        self._e2e = self._histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its end.",
            REQUEST_BUCKETS_S,
        )
        self._queue_time = self._histogram(
            "request_queue_time_seconds",
            "From a request's arrival until its first tokens were computed.",
            REQUEST_BUCKETS_S,
        )
        self._prefill_time = self._histogram(
            "request_prefill_time_seconds",
            "From the end of a request's wait to its first token.",
            REQUEST_BUCKETS_S,
        )
        self._decode_time = self._histogram(
            "request_decode_time_seconds",
            "From a request's first token to its end.",
            REQUEST_BUCKETS_S,
        )
        self._request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request that ended.", TOKEN_BUCKETS
        )
        self._request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens that an ended request generated.", TOKEN_BUCKETS
        )
        self._finished = self._counter(
            "requests", "Requests that ended, by reason.", ["finished_reason"]
        )
        for reason in FinishReason:
            self._finished.labels(reason.value)
        self._refused = self._counter(
            "requests_refused", "Requests refused on arrival, by gRPC status.", ["status"]
        )
        for status in statuses():
            self._refused.labels(status)
        self._prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens computed or found cached."
        )
        self._cached_tokens = self._counter(
            "prompt_tokens_cached", "Prompt tokens whose KV came from the prefix cache."
        )
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")

    def _define_scheduler(self) -> None:
        self._running = self._gauge("num_requests_running", "Sequences that hold KV blocks.")
        self._waiting = self._gauge("num_requests_waiting", "Sequences that wait for room.")
        self._queued_tokens = self._gauge(
            "num_queued_prompt_tokens", "Prompt tokens of sequences that never ran."
        )
        self._kv_usage = self._gauge("kv_cache_usage_ratio", "Share of the KV blocks in use.")
        self._kv_blocks = self._gauge(
            "kv_cache_blocks", "KV blocks that there are, on the stage that has fewest."
        )
        self._preemptions = self._counter(
            "num_preemptions", "Sequences put back to waiting because KV blocks ran out."
        )

    def _define_pipeline(self) -> None:
        self._step_time = self._histogram(
            "step_seconds", "From a micro-batch's sending to its result.", STEP_BUCKETS_S
        )
        self._overhead = self._histogram(
            "step_overhead_seconds",
            "Wall time of a step less its stages' forwards, of steps that met no other.",
            OVERHEAD_BUCKETS_S,
        )
        self._stage_overhead = self._histogram(
            "step_overhead_per_stage_seconds",
            "The step overhead divided by the number of stages.",
            OVERHEAD_BUCKETS_S,
        )
        self._in_flight = self._gauge("num_micro_batches_in_flight", "Micro-batches under way.")

    def _define_deployment(self) -> None:
        self._build = self._gauge("build_info", "Always 1, with the version.", ["version"])
        self._model = self._gauge(
            "model_info", "Always 1, with what is served.", ["model", "family", "format"]
        )
        self._start_time = self._gauge(
            "start_time_seconds", "When the service started, in Unix time."
        )
        self._start_time.set(time.time())
        self._health = self._gauge(
            "health_state", "1 for the state that the service is in, else 0.", ["state"]
        )
        for state in HEALTH_STATES:
            self._health.labels(state)
        self._epoch = self._gauge("replica_epoch", "Generation of the replica, from 1.")

    def _define_recoveries(self) -> None:
        self._recoveries = self._counter(
            "recoveries", "Times that the pipeline was lost and came back."
        )
        self._replayed_tokens = self._counter(
            "replayed_tokens", "Tokens whose KV was lost with a stage and had to be computed again."
        )
        self._recovery_time = self._histogram(
            "recovery_seconds",
            "From noticing that the pipeline was lost until it could work again.",
            RECOVERY_BUCKETS_S,
        )

    def _define_stages(self) -> None:
        self._stage_busy = self._counter(
            "stage_busy_seconds",
            "Time that a stage spent computing; its rate is the stage's busy share.",
            ["stage"],
        )
        self._stage_info = self._gauge(
            "stage_info",
            "Always 1, with what a stage is.",
            ["stage", "device", "node", "format", "kv_format"],
        )
        self._stage_layers = self._gauge("stage_layers", "Layers that a stage holds.", ["stage"])
        self._seen_time = self._gauge(
            "stage_status_timestamp_seconds", "When all stages last reported, in Unix time."
        )
        self._predicted_bytes = self._gauge(
            "stage_predicted_weight_bytes", "Weights of a stage, from shapes.", ["stage"]
        )
        self._measured_bytes = self._gauge(
            "stage_weight_bytes", "Weights of a stage, from its tensors.", ["stage"]
        )
        self._kv_bytes = self._gauge("stage_kv_cache_bytes", "KV cache of a stage.", ["stage"])
        self._workspace_bytes = self._gauge(
            "stage_workspace_bytes", "Workspace counted for a stage.", ["stage"]
        )
        self._rss_bytes = self._gauge(
            "stage_rss_anon_bytes", "Anonymous resident memory of a stage's process.", ["stage"]
        )
        self._gpu_bytes = self._gauge(
            "stage_gpu_bytes", "Given out to a stage by its GPU's allocator.", ["stage"]
        )
        self._predicted_held_bytes = self._gauge(
            "stage_predicted_held_bytes", "Weights and KV cache of a stage, from shapes.", ["stage"]
        )
        self._resident_bytes = self._gauge(
            "stage_resident_bytes",
            "The same as the kernel, or the GPU's allocator, saw it when the stage had loaded.",
            ["stage"],
        )
        self._differences = self._gauge(
            "stage_memory_differences",
            "In how many ways a stage's memory differs from what was predicted.",
            ["stage"],
        )
        self._total_bytes = self._gauge(
            "stage_memory_bytes", "Weights, KV cache and workspace of a stage.", ["stage"]
        )
        self._budget_bytes = self._gauge(
            "stage_memory_budget_bytes",
            "Most that a stage may take; absent when it has no limit.",
            ["stage"],
        )

    # -- requests ----------------------------------------------------------------------------

    def observe_first_token(self, seconds: float) -> None:
        """Seconds from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def observe_inter_token(self, seconds: float) -> None:
        """Seconds between two consecutive tokens of a sequence."""
        self._inter_token.observe(seconds)

    def observe_queue_time(self, seconds: float) -> None:
        """Seconds from a request's arrival until its first tokens were computed."""
        self._queue_time.observe(seconds)

    def count_refused(self, status: str) -> None:
        """A request refused on arrival; `status`: name of its gRPC status."""
        self._refused.labels(status).inc()

    def count_finished(self, record: RequestRecord) -> None:
        """A request that ended."""
        self._finished.labels(record.finish_reason.value).inc()
        self._e2e.observe(record.duration_s)
        self._request_prompt_tokens.observe(record.num_prompt_tokens)
        self._request_generation_tokens.observe(record.num_generated_tokens)
        if record.prefill_s is not None:
            self._prefill_time.observe(record.prefill_s)
        if record.decode_s is not None:
            self._decode_time.observe(record.decode_s)

    # -- steps -------------------------------------------------------------------------------

    def observe_step(
        self, *, wall_s: float, forward_s: Sequence[float], alone: bool = True
    ) -> None:
        """One micro-batch's way through the pipeline.

        Args:
            wall_s: seconds from its sending to its result.
            forward_s: seconds each stage computed, first stage first.
            alone: it met no other; else it also waited for others, and its overhead is not known.
        """
        self._step_time.observe(wall_s)
        if len(forward_s) > len(self._busy_of):
            self._expect_stages(len(forward_s))
        for busy, seconds in zip(self._busy_of, forward_s, strict=False):
            busy.inc(seconds)
        if alone and forward_s:
            overhead = max(0.0, wall_s - sum(forward_s))
            self._overhead.observe(overhead)
            self._stage_overhead.observe(overhead / len(forward_s))

    def set_load(self, counts: SchedulerCounts) -> None:
        """How full the service is now."""
        self._running.set(counts.num_running)
        self._waiting.set(counts.num_waiting)
        self._queued_tokens.set(counts.num_queued_tokens)
        self._kv_usage.set(counts.num_blocks_used / max(1, counts.num_blocks))
        self._kv_blocks.set(counts.num_blocks)

    def set_counts(self, counts: SchedulerCounts) -> None:
        """The scheduler's state now; its totals since the start become counters here. Called from
        one thread, in the order in which the counts were taken."""
        self.set_load(counts)
        self._raise_to(self._preemptions, counts.num_preemptions)
        self._raise_to(self._prompt_tokens, counts.num_prompt_tokens)
        self._raise_to(self._cached_tokens, counts.num_cached_tokens)
        self._raise_to(self._generation_tokens, counts.num_generated_tokens)

    def _raise_to(self, counter: Counter, total: int) -> None:
        """Follow a total; one that fell belongs to a new scheduler, which began at 0."""
        before = self._totals.get(counter, 0)
        self._totals[counter] = total
        counter.inc(total - before if total >= before else total)

    # -- the deployment ----------------------------------------------------------------------

    def set_model(self, *, version: str, model: str, family: str, weight_format: str) -> None:
        """What runs here, and what it serves; once."""
        self._build.labels(version).set(1)
        self._model.labels(model, family, weight_format).set(1)

    def set_health(self, health: str, *, epoch: int, num_in_flight: int) -> None:
        """The state of the service now: one of HEALTH_STATES."""
        for state in HEALTH_STATES:
            self._health.labels(state).set(state == health)
        self._epoch.set(epoch)
        self._in_flight.set(num_in_flight)

    def observe_recovery(self, recovery: Recovery) -> None:
        """The pipeline was lost, and has come back."""
        self._recoveries.inc()
        self._replayed_tokens.inc(recovery.num_replayed_tokens)
        self._recovery_time.observe(recovery.resumed_s - recovery.lost_s)

    def set_stages(self, stages: Sequence[StageStatus]) -> None:
        """What the stages hold now, as they report it."""
        self._seen_time.set(time.time())
        self._stage_info.clear()  # a stage may have moved, or changed its format
        for status in stages:
            stage, memory = str(status.stage_index), status.memory
            self._stage_info.labels(
                stage, status.device, status.node_id, status.format, status.kv_format
            ).set(1)
            self._stage_layers.labels(stage).set(status.end_layer - status.first_layer)
            self._predicted_bytes.labels(stage).set(memory.predicted_weight_bytes)
            self._measured_bytes.labels(stage).set(memory.weight_bytes)
            self._kv_bytes.labels(stage).set(memory.kv_cache_bytes)
            self._workspace_bytes.labels(stage).set(memory.workspace_bytes)
            self._rss_bytes.labels(stage).set(memory.rss_anon_bytes)
            self._gpu_bytes.labels(stage).set(memory.gpu_bytes)
            self._predicted_held_bytes.labels(stage).set(memory.predicted_held_bytes)
            self._resident_bytes.labels(stage).set(memory.resident_bytes)
            self._differences.labels(stage).set(len(memory.differences))
            self._total_bytes.labels(stage).set(memory.total_bytes)
            if memory.budget_bytes is not None:
                self._budget_bytes.labels(stage).set(memory.budget_bytes)


class MetricsServer:
    """Answers Prometheus on host:port from a thread, until closed.

    Raises:
        OSError: the address cannot be listened on.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        self._server, self._thread = start_http_server(port, addr=host, registry=registry)

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._server.server_port)

    def close(self) -> None:
        """Stop answering; the port is free when this returns."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)

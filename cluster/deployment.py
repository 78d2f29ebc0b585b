"""`tightfit serve`: from a checkpoint and a configuration to a service that answers, and back to
nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from tightfit import __version__
from tightfit.cluster.config import ServeConfig, split_address
from tightfit.cluster.engine import Engine, ModelInfo
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.gateway.watch import Tracer
from tightfit.cluster.launch import (
    ModelDescription,
    RayOptions,
    RaySession,
    StageGroup,
    describe_model,
)
from tightfit.cluster.metrics import Metrics, MetricsServer
from tightfit.cluster.monitor import Monitor
from tightfit.cluster.pipeline import LinkedStages, Pipeline
from tightfit.cluster.planning.memory import plan_stages
from tightfit.cluster.progress import LoadView
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.tokenizer import Tokenizer, load_tokenizer
from tightfit.workers.api import LoadProgress, StageSpec, StageStatus
from tightfit.workers.model_formats import ModelFormats, model_formats
from tightfit.workers.shard_bytes import format_label

log = logging.getLogger(__name__)

FIRST_EPOCH = 1
SWITCH_INTERVAL_S = 0.0005
"""The engine's thread and the event loop take turns at the interpreter; 5 ms, Python's default, is
a token's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A pipeline whose stages hold their shards and are wired."""

    group: StageGroup
    links: LinkedStages
    statuses: tuple[StageStatus, ...]


def chosen_formats(config: ServeConfig, model: ModelDescription) -> ModelFormats:
    """The formats of the model's parts.

    Raises:
        ConfigError: they do not go together.
    """
    try:
        return model_formats(
            model.config,
            config.format,
            head=config.head_format,
            kv=config.kv_format,
            embedding_place=config.embedding_place,
            outlier_threshold=config.llm_int8_threshold,
            device=config.device,
        )
    except ValueError as error:
        raise ConfigError(f"head_format: {error}") from error


def stage_specs(config: ServeConfig, model: ModelDescription) -> list[StageSpec]:
    """The stages, layers split by bytes.

    Raises:
        ConfigError: formats that do not go together.
        PlacementError: more stages than layers, or a shard over its budget.
    """
    ranges = plan_stages(
        model.config,
        chosen_formats(config, model),
        num_stages=config.stages,
        budget_bytes=config.memory_budget_bytes,
        kv_blocks=config.kv_blocks,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        balance=config.balance,
    )
    return [
        StageSpec(
            model_path=str(model.path),
            stage_index=index,
            num_stages=len(ranges),
            first_layer=first,
            end_layer=end,
            format=config.format,
            head_format=config.head_format,
            kv_format=config.kv_format,
            embedding_place=config.embedding_place,
            llm_int8_threshold=config.llm_int8_threshold,
            device=config.device,
            memory_budget_bytes=config.memory_budget_bytes,
            block_size=config.block_size,
            num_kv_blocks=config.kv_blocks,
            max_kv_blocks=config.max_kv_blocks,
            max_batch_tokens=config.max_batch_tokens,
            num_threads=config.threads_per_stage,
        )
        for index, (first, end) in enumerate(ranges)
    ]


def ray_options(config: ServeConfig) -> RayOptions:
    """How to reach, or start, Ray."""
    return RayOptions(
        address=config.ray_address,
        num_cpus=config.stages * config.threads_per_stage,
        threads_per_stage=config.threads_per_stage,
        gpus_per_stage=1 if config.device == "cuda" else 0,
        strategy=config.ray_strategy,
        placement_timeout_s=config.placement_timeout_s,
    )


def start_replica(
    session: RaySession,
    config: ServeConfig,
    specs: list[StageSpec],
    on_lost: Callable[[str], None],
    cleanup: ExitStack,
    *,
    check: Callable[[], None],
) -> Replica:
    """Place, load and wire the stages; `cleanup` ends them, `check` may raise to end the load."""
    group = StageGroup(session, specs, on_lost=on_lost)
    cleanup.callback(group.close)
    group.place()
    labels = [f"stage {spec.stage_index}" for spec in specs]
    with LoadView(labels) as view:

        def report(index: int, progress: LoadProgress) -> None:
            check()
            view.update(labels[index], progress)

        statuses = group.load(timeout_s=config.load_timeout_s, progress=report)
    return Replica(group=group, links=group.connect(epoch=FIRST_EPOCH), statuses=tuple(statuses))


def make_engine(
    config: ServeConfig,
    model: ModelDescription,
    replica: Replica,
    tokenizer: Tokenizer,
    metrics: Metrics,
) -> Engine:
    """The engine of a loaded replica; not started."""
    # A block id means the same on every stage: the smallest cache decides.
    num_blocks = min(status.memory.num_kv_blocks for status in replica.statuses)
    limit = min(config.max_context or model.config.max_position, model.config.max_position)
    eos = model.config.eos_token_ids | tokenizer.eos_token_ids
    scheduler = Scheduler(
        SchedulerConfig(
            num_blocks=num_blocks,
            block_size=config.block_size,
            max_batch_tokens=config.max_batch_tokens,
            max_running_sequences=config.max_running_sequences,
            max_queued_requests=config.max_queued_requests,
            max_queued_tokens=config.max_queued_tokens,
            max_context_tokens=limit,
            vocab_size=model.config.vocab_size,
            num_stages=config.stages,
            eos_token_ids=eos,
            enable_prefix_cache=config.prefix_cache,
        )
    )
    pipeline = Pipeline(replica.links, max_in_flight=config.stages)
    pipeline.begin_epoch(FIRST_EPOCH)
    info = ModelInfo(
        name=config.model_name,
        family=model.config.family,
        num_layers=model.config.num_layers,
        vocab_size=model.config.vocab_size,
        max_context_tokens=scheduler.config.max_context,
        weight_format=format_label(model.config, chosen_formats(config, model)),
        eos_token_ids=eos,
        num_stages=config.stages,
    )
    metrics.set_model(
        version=__version__, model=info.name, family=info.family, weight_format=info.weight_format
    )
    return Engine(
        scheduler,
        pipeline,
        model=info,
        metrics=metrics,
        stage_statuses=replica.group.statuses,
        num_traced_steps=0 if config.trace_endpoint is None else config.trace_steps,
    )


def start_tracing(config: ServeConfig, cleanup: ExitStack) -> Tracer | None:
    """Where traces go; None: nowhere. `cleanup` sends what is left.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if config.trace_endpoint is None:
        return None
    try:
        from tightfit.cluster.tracing import Tracing, otlp_exporter
    except ImportError as error:
        raise ConfigError(
            f"trace_endpoint: {error}. Install it with: pip install 'tightfit-serve[tracing]'"
        ) from error
    tracing = Tracing(
        otlp_exporter(config.trace_endpoint),
        model=config.model_name,
        version=__version__,
        share=config.trace_share,
    )
    cleanup.callback(tracing.close)
    return tracing


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM (running streams finish first) or SIGINT; returns the exit code.

    Raises:
        TightfitError, WorkerError: it could not start, or the pipeline was lost; everything that
        was started
            has been ended.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with ExitStack() as cleanup, Interrupts() as interrupts:
        tracer = start_tracing(config, cleanup)
        model = describe_model(config.model)
        _announce(config, model)
        specs = stage_specs(config, model)
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        cleanup.callback(loader.shutdown, wait=False, cancel_futures=True)
        tokenizer = loader.submit(
            load_tokenizer, model.path, eos_token_ids=model.config.eos_token_ids
        )
        registry = CollectorRegistry()
        metrics = Metrics(registry, num_stages=len(specs))
        session = RaySession(ray_options(config))
        cleanup.callback(session.close)
        lost = LostStage()
        interrupts.check()
        replica = start_replica(
            session, config, specs, lost.report, cleanup, check=interrupts.check
        )
        engine = make_engine(config, model, replica, tokenizer.result(), metrics)
        lost.tell(engine.fail)
        monitor = Monitor(engine, metrics)
        cleanup.callback(monitor.close)
        monitor.start()
        if config.metrics_listen is not None:
            host, port = split_address(config.metrics_listen)
            cleanup.callback(MetricsServer(registry, host, port).close)
        gc.collect()
        gc.freeze()  # nothing of the start-up is garbage later
        return asyncio.run(_serve(config, engine, tokenizer.result(), metrics, tracer, interrupts))


class LostStage:
    """Passes on that a stage was lost, also when that came before anybody listened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reason: str | None = None
        self._listener: Callable[[str], None] | None = None

    def report(self, reason: str) -> None:
        """A stage is lost."""
        with self._lock:
            self._reason = reason
            listener = self._listener
        if listener is not None:
            listener(reason)

    def tell(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the reason, now or when there is one."""
        with self._lock:
            self._listener = listener
            reason = self._reason
        if reason is not None:
            listener(reason)


def _announce(config: ServeConfig, model: ModelDescription) -> None:
    formats = chosen_formats(config, model)
    source = model.source_format + (", its numbers as stored" if formats.stored else "")
    keys = "" if formats.kv == formats.activations else f" with keys and values in {formats.kv}"
    fmt = format_label(model.config, formats)
    print(
        f"{config.model_name}: {model.config.family}, {model.config.num_layers} layers, from "
        f"{source}, as {fmt}{keys} on {config.stages} stage(s)",
        file=sys.stderr,
    )
    for note in model.config.notes:
        print(f"{config.model_name}: {note}", file=sys.stderr)


class Interrupts:
    """While the `with` block runs, SIGINT and SIGTERM raise KeyboardInterrupt in the main thread;
    the handlers before are put back afterwards.

    An exception that a signal raises is lost where it meets a callback of C code, a finaliser or a
    library that catches everything. That a signal came is therefore remembered, for `check`.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self._came = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a signal."""
        if self._came:
            raise KeyboardInterrupt

    def _interrupt(self, _number: int, _frame: object) -> None:
        self._came = True
        raise KeyboardInterrupt

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._interrupt) for number in self.NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


async def _serve(
    config: ServeConfig,
    engine: Engine,
    tokenizer: Tokenizer,
    metrics: Metrics,
    tracer: Tracer | None,
    interrupts: Interrupts,
) -> int:
    """Answer until a signal or a drain ends it."""
    loop = asyncio.get_running_loop()
    stop, drain = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, drain.set)
    interrupts.check()
    gateway = GatewayServer(engine, tokenizer, metrics, tracer=tracer)
    host, port = split_address(config.listen)
    try:
        bound = await gateway.start(host, port)
        print(f"ready: {config.model_name} on {host}:{bound}", flush=True)
        waits = [
            asyncio.create_task(event.wait()) for event in (stop, drain, gateway.drain_requested)
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if not stop.is_set():
            started = time.monotonic()
            drained = asyncio.create_task(gateway.drain(config.drain_grace_s))
            await asyncio.wait([drained, waits[0]], return_when=asyncio.FIRST_COMPLETED)
            log.info("drained in %.1f s", time.monotonic() - started)
            drained.cancel()
        for wait in waits:
            wait.cancel()
        return 0
    finally:
        engine.stop()
        await gateway.stop()

"""`tightfit serve`: from a checkpoint and a configuration to a service that answers, and back to
nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from tightfit.cluster.arrangement import Arrangement, arrange, arrange_early, compare
from tightfit.cluster.config import PlanConfig, ServeConfig, split_address
from tightfit.cluster.deployment_status import ModelInfo
from tightfit.cluster.engine import Engine
from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.gateway.protection import gateway_security
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.gateway.watch import Tracer
from tightfit.cluster.launch import StageGroup
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.model import ModelDescription, describe_model
from tightfit.cluster.nodes import alive_nodes
from tightfit.cluster.observing import show, start_tracing
from tightfit.cluster.pipeline import LinkedStages, Pipeline
from tightfit.cluster.placement import Place, Placement
from tightfit.cluster.progress import LoadView
from tightfit.cluster.ray_session import RayOptions, RaySession
from tightfit.cluster.relocation import is_there, relocate
from tightfit.cluster.replanning import PlanWatch, better_plan
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.supervisor import FIRST_EPOCH, Supervisor
from tightfit.cluster.surroundings import Surroundings
from tightfit.cluster.tokenizer import Tokenizer, load_tokenizer
from tightfit.cluster.turn import PlanningTurn
from tightfit.workers.api import LoadProgress, StageSpec, StageStatus
from tightfit.workers.shard_bytes import format_label

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005
"""The engine's thread and the event loop take turns at the interpreter; 5 ms, Python's default, is
a token's time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """A pipeline whose stages hold their shards and are wired."""

    group: StageGroup
    links: LinkedStages
    statuses: tuple[StageStatus, ...]


def ray_options(config: ServeConfig) -> RayOptions:
    """How to reach, or start, Ray. A private cluster gives out this machine's cores, and more where
    more are asked for."""
    threads = config.threads_per_stage or 1
    cores = len(os.sched_getaffinity(0))
    return RayOptions(
        address=config.ray_address,
        adds_node=config.ray_join,
        num_cpus=max(cores, (config.stages or 1) * threads),
        threads_per_stage=threads,
        strategy=config.ray_strategy,
        placement_timeout_s=config.placement_timeout_s,
        insecure=config.insecure_ray,
    )


def start_replica(
    session: RaySession,
    arrangement: Arrangement,
    supervisor: Supervisor,
    cleanup: ExitStack,
    *,
    turn: PlanningTurn,
    check: Callable[[], None],
) -> Replica:
    """Place, load and wire the stages.

    Args:
        session: connected.
        arrangement: of the stages.
        supervisor: hears of those that are lost.
        cleanup: ends them.
        turn: taken where a stage has to move; `supervise` gives it back.
        check: may raise to end the load.
    """
    specs = arrangement.specs
    plan = arrangement.placement.plan

    def moved(
        index: int, specs: Sequence[StageSpec], places: Sequence[Place]
    ) -> tuple[StageSpec, Place]:
        if is_there(specs[index], places, alive_nodes()):
            return specs[index], places[index]
        assert plan is not None, "only stages with places are moved"
        turn.take(supervisor.check)
        return relocate(plan, specs[index], places, alive_nodes())

    group = StageGroup(
        session, specs, places=arrangement.places, on_lost=supervisor.lost, relocate=moved
    )
    cleanup.callback(group.close)
    group.place()
    labels = [f"stage {spec.stage_index}" for spec in specs]
    with LoadView(labels) as view:

        def report(index: int, progress: LoadProgress) -> None:
            check()
            view.update(labels[index], progress)

        timeout_s = arrangement.config.load_timeout_s
        statuses = group.load(timeout_s=timeout_s, progress=report)
    for line in compare(arrangement, statuses):
        print(line, file=sys.stderr)
    return Replica(group=group, links=group.connect(epoch=FIRST_EPOCH), statuses=tuple(statuses))


def common_blocks(statuses: Sequence[StageStatus]) -> int:
    """KV blocks that every stage has. A block id means the same on each: the smallest cache
    decides."""
    return min(status.memory.num_kv_blocks for status in statuses)


def make_engine(
    placement: Placement,
    model: ModelDescription,
    replica: Replica,
    tokenizer: Tokenizer,
    metrics: Metrics,
) -> Engine:
    """The engine of a loaded replica; not started."""
    config, num_stages = placement.config, len(placement.specs)
    num_blocks = common_blocks(replica.statuses)
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
            num_stages=num_stages,
            eos_token_ids=eos,
            enable_prefix_cache=config.prefix_cache,
        )
    )
    pipeline = Pipeline(replica.links, max_in_flight=num_stages)
    pipeline.begin_epoch(FIRST_EPOCH)
    return Engine(
        scheduler,
        pipeline,
        model=ModelInfo(
            name=config.model_name,
            family=model.config.family,
            num_layers=model.config.num_layers,
            vocab_size=model.config.vocab_size,
            max_context_tokens=scheduler.config.max_context,
            weight_format=format_label(model.config, placement.formats),
            eos_token_ids=eos,
            num_stages=num_stages,
        ),
        metrics=metrics,
        stage_statuses=replica.group.statuses,
        num_traced_steps=0 if config.trace_endpoint is None else config.trace_steps,
    )


def serve(config: ServeConfig, plan_config: PlanConfig | None = None) -> int:
    """Serve until SIGTERM (running streams finish first) or SIGINT; returns the exit code.

    Args:
        config: of the service.
        plan_config: how to plan, where neither a plan nor a number of stages is given.

    Raises:
        TightfitError, WorkerError: it could not start; everything that was started has been ended.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with ExitStack() as cleanup, Interrupts() as interrupts:
        security = gateway_security(config)
        tracer = start_tracing(config, cleanup)
        model = describe_model(config.model)
        early = arrange_early(config, model)
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        cleanup.callback(loader.shutdown, wait=False, cancel_futures=True)
        tokenizer = loader.submit(
            load_tokenizer, model.path, eos_token_ids=model.config.eos_token_ids
        )
        session = RaySession(ray_options(config if early is None else early.config))
        cleanup.callback(session.close)
        interrupts.check()
        turn = PlanningTurn(config.model_name)
        cleanup.callback(turn.release)
        if early is None and not session.is_private:
            turn.take(interrupts.check)
        arrangement = arrange(session, config, model, early, plan_config)
        budget, placement, config = (
            config.memory_budget_bytes,
            arrangement.placement,
            arrangement.config,
        )
        _announce(placement, model)
        registry = CollectorRegistry()
        metrics = Metrics(registry, num_stages=len(arrangement.specs))
        supervisor = Supervisor()
        interrupts.check()
        replica = start_replica(
            session, arrangement, supervisor, cleanup, turn=turn, check=interrupts.check
        )
        turn.release()
        engine = make_engine(placement, model, replica, tokenizer.result(), metrics)
        supervise(supervisor, engine, replica, config, turn)
        cleanup.callback(supervisor.close)
        show(config, engine, metrics, registry, cleanup)
        watch = watch_plan(arrangement, replica.group, engine, cpu_budget_bytes=budget)
        if watch is not None:
            watch.start()
            cleanup.callback(watch.close)
        gc.collect()
        gc.freeze()  # nothing of the start-up is garbage later
        return asyncio.run(
            _serve(config, engine, tokenizer.result(), metrics, tracer, security, interrupts)
        )


def supervise(
    supervisor: Supervisor,
    engine: Engine,
    replica: Replica,
    config: ServeConfig,
    turn: PlanningTurn,
) -> None:
    """Let a lost pipeline be brought back: of its stages those that are lost start anew. One that
    moves does so in this service's turn to plan: others would take the same device."""

    def bring_back(epoch: int) -> int:
        try:
            statuses = replica.group.recover(
                epoch=epoch, timeout_s=config.load_timeout_s, check=supervisor.check
            )
        finally:
            turn.release()
        return common_blocks(statuses)

    supervisor.start(engine, bring_back)


def watch_plan(
    arrangement: Arrangement, group: StageGroup, engine: Engine, *, cpu_budget_bytes: int | None
) -> PlanWatch | None:
    """Looks for a better plan while the engine serves, as long as all stages are where the plan has
    them; None where there is no plan, or it is not wanted. Not started."""
    plan, request, config = arrangement.placement.plan, arrangement.request, arrangement.config
    if plan is None or request is None or config.replan_interval_s == 0:
        return None
    around = Surroundings(
        plan,
        request.inventory.devices,
        arrangement.places,
        cpu_budget_bytes=cpu_budget_bytes,
    )

    def look() -> str | None:
        if group.has_moved:
            return None
        inventory = around.inventory()
        return better_plan(request, plan, inventory, max_kv_blocks=config.max_kv_blocks)

    def tell(news: str | None) -> None:
        engine.better_plan = news or ""
        if news is not None:
            print(f"a better plan has become possible: {news}; a restart takes it", file=sys.stderr)

    return PlanWatch(look, config.replan_interval_s, tell)


def _announce(placement: Placement, model: ModelDescription) -> None:
    config, formats = placement.config, placement.formats
    source = model.source_format + (", its numbers as stored" if formats.stored else "")
    keys = "" if formats.kv == formats.activations else f" with keys and values in {formats.kv}"
    fmt = format_label(model.config, formats)
    print(
        f"{config.model_name}: {model.config.family}, {model.config.num_layers} layers, from "
        f"{source}, as {fmt}{keys} on {len(placement.specs)} stage(s)",
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
    security: GatewaySecurity,
    interrupts: Interrupts,
) -> int:
    """Answer until a signal or a drain ends it."""
    loop = asyncio.get_running_loop()
    stop, drain = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, stop.set)
    loop.add_signal_handler(signal.SIGTERM, drain.set)
    interrupts.check()
    gateway = GatewayServer(engine, tokenizer, metrics, security, tracer=tracer)
    host, port = split_address(config.listen)
    try:
        bound = await gateway.start(host, port)
        if config.health_listen is not None:
            await gateway.start_health(*split_address(config.health_listen))
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

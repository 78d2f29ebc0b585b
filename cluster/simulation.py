"""What serving does on a pipeline that need not be there: a discrete-event model with the service's
own scheduler.

The scheduler that serves decides what runs next, in simulated time; as many micro-batches are under
way as there are stages. Stages are a FIFO, so that each micro-batch's way is known when it is sent:

    starts on a stage = max(arrives there, the stage is free)
    arrives at the next = its end + the link's time

The control plane takes in one result after the other, refills the pipeline, and takes `control_s`
for that. Nothing here reads a clock: the same load takes the same time, to the last digit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.planning.plan import Plan, StagePlan
from tightfit.cluster.request import Request, SamplingParams
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.workers.api import SampledToken, SequenceSlice, StepResult

ANY_TOKEN = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Streams that are all there at once; as one ends, the next request takes its place."""

    streams: int
    """Requests at the same time."""
    prompt: int
    """Tokens of each request's prompt, which nothing of is cached."""
    output: int
    """Tokens that each request generates."""
    requests: int
    """In all."""

    @property
    def tokens(self) -> int:
        """Of all requests, prompts and output."""
        return self.requests * (self.prompt + self.output)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """What of a micro-batch decides its time."""

    tokens: int
    """That it takes a step further."""
    rows: int
    """Of them, those that the LM head sees."""
    kv_tokens: int
    """Whose keys and values it reads, of all its sequences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedStage:
    """A stage as its times."""

    step_s: Callable[[BatchShape], float]
    link_s: Callable[[BatchShape], float]
    """On the way into it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Of many times, in seconds."""

    mean_s: float
    p50_s: float
    p99_s: float

    @classmethod
    def of(cls, times: Sequence[float]) -> Spread:
        """Of none, all are 0."""
        if not times:
            return cls(mean_s=0.0, p50_s=0.0, p99_s=0.0)
        ranked = sorted(times)
        p50, p99 = (ranked[ceil(share * len(ranked)) - 1] for share in (0.5, 0.99))
        return cls(mean_s=sum(ranked) / len(ranked), p50_s=p50, p99_s=p99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What came of a load."""

    load: Load
    elapsed_s: float
    """From the arrival of the first request to the last token."""
    tokens_per_s: float
    """Generated tokens over all of that time."""
    ttft: Spread
    """From a request's arrival to its first token."""
    itl: Spread
    """From each token of a request to its next."""
    busy: tuple[float, ...]
    """Share of the time in which each stage computes, 0 to 1, first to last."""
    micro_batches: int
    preemptions: int
    """For want of KV blocks."""


def simulate(
    stages: Sequence[SimulatedStage],
    load: Load,
    scheduler: SchedulerConfig,
    *,
    return_s: float = 0.0,
    control_s: float = 0.0,
) -> Simulation:
    """Serve a load.

    Args:
        stages: first to last.
        load: what is asked of them.
        scheduler: sizes and limits; the number of stages and the queues' limits are set here.
        return_s: seconds from the last stage to the control plane.
        control_s: seconds of the control plane for each result, in which it sends nothing.

    Raises:
        ConfigError: a request of the load is longer than the KV cache or the model's context.
    """
    if load.prompt + load.output > scheduler.max_context:
        raise ConfigError(
            f"a stream of {load.prompt} + {load.output} tokens is longer than the "
            f"{scheduler.max_context:,} that one may have here: simulate shorter ones"
        )
    config = replace(
        scheduler,
        num_stages=len(stages),
        max_queued_requests=load.streams,
        max_queued_tokens=load.streams * load.prompt,
        enable_prefix_cache=False,
        eos_token_ids=frozenset(),
        vocab_size=None,
    )
    run = _Run(stages, load, Scheduler(config), return_s=return_s, control_s=control_s)
    return run.serve()


@dataclass(frozen=True, slots=True)
class _Flight:
    """A micro-batch under way."""

    slices: tuple[SequenceSlice, ...]
    done_s: float
    """When its result is at the control plane."""


class _Run:
    def __init__(
        self,
        stages: Sequence[SimulatedStage],
        load: Load,
        scheduler: Scheduler,
        *,
        return_s: float,
        control_s: float,
    ) -> None:
        self._stages, self._load, self._scheduler = stages, load, scheduler
        self._return_s, self._control_s = return_s, control_s
        self._now_s = 0.0
        """On the control plane's clock."""
        self._in_flight: deque[_Flight] = deque()
        self._free_s = [0.0] * len(stages)
        self._busy_s = [0.0] * len(stages)
        self._micro_batches = self._requests = 0
        self._last_s: dict[str, float] = {}
        """Of each request, its arrival or its last token."""
        self._ttft: list[float] = []
        self._itl: list[float] = []

    def serve(self) -> Simulation:
        for _ in range(min(self._load.streams, self._load.requests)):
            self._add_request()
        self._fill()
        while self._in_flight:
            flight = self._in_flight.popleft()
            self._now_s = max(self._now_s, flight.done_s)
            self._apply(flight.slices)
            done_s = self._now_s
            self._now_s += self._control_s
            self._fill()
        assert not self._scheduler.has_work, "a request that can run was not served"
        return Simulation(
            load=self._load,
            elapsed_s=done_s,
            tokens_per_s=self._load.requests * self._load.output / done_s,
            ttft=Spread.of(self._ttft),
            itl=Spread.of(self._itl),
            busy=tuple(busy / done_s for busy in self._busy_s),
            micro_batches=self._micro_batches,
            preemptions=self._scheduler.counts().num_preemptions,
        )

    def _add_request(self) -> None:
        request = Request(
            request_id=str(self._requests),
            prompt_token_ids=(ANY_TOKEN,) * self._load.prompt,
            sampling=SamplingParams(max_tokens=self._load.output, ignore_eos=True),
        )
        self._requests += 1
        self._last_s[request.request_id] = self._now_s
        self._scheduler.add(request, self._now_s)

    def _fill(self) -> None:
        """Send micro-batches as long as there is room, as the engine does."""
        while len(self._in_flight) < len(self._stages):
            slices = self._scheduler.next_micro_batch(self._now_s)
            if slices is None:
                return
            self._in_flight.append(_Flight(slices, self._send(_shape(slices))))
            self._micro_batches += 1

    def _send(self, batch: BatchShape) -> float:
        """Through all stages; when its result is back."""
        time_s = self._now_s
        for number, stage in enumerate(self._stages):
            start_s = max(time_s + stage.link_s(batch), self._free_s[number])
            step_s = stage.step_s(batch)
            time_s = self._free_s[number] = start_s + step_s
            self._busy_s[number] += step_s
        return time_s + self._return_s

    def _apply(self, slices: tuple[SequenceSlice, ...]) -> None:
        tokens = [
            SampledToken(sequence_id=part.sequence_id, token_id=ANY_TOKEN)
            for part in slices
            if part.sampling is not None
        ]
        result = StepResult(epoch=0, step=0, tokens=tokens)
        for event in self._scheduler.apply(slices, result, self._now_s):
            waited_s = self._now_s - self._last_s[event.request_id]
            (self._itl if event.token_offset else self._ttft).append(waited_s)
            self._last_s[event.request_id] = self._now_s
            if event.finish_reason is not None:
                del self._last_s[event.request_id]
                if self._requests < self._load.requests:
                    self._add_request()


def _shape(slices: Sequence[SequenceSlice]) -> BatchShape:
    return BatchShape(
        tokens=sum(len(part.token_ids) for part in slices),
        rows=sum(part.sampling is not None for part in slices),
        kv_tokens=sum(part.start_position + len(part.token_ids) for part in slices),
    )


# -- plans -----------------------------------------------------------------------------------


def simulate_plan(plan: Plan, load: Load, *, max_context_tokens: int) -> Simulation:
    """Serve a load by a plan: its predicted times, its KV blocks, the service's default limits.

    Args:
        plan: of the pipeline.
        load: what is asked of it.
        max_context_tokens: most tokens of one sequence that the model can.

    Raises:
        ConfigError: see `simulate`.
    """
    stages = [_planned(plan, number) for number in range(len(plan.stages))]
    config = SchedulerConfig(
        num_blocks=plan.kv_blocks,
        block_size=plan.block_size,
        max_batch_tokens=plan.max_batch_tokens,
        max_context_tokens=max_context_tokens,
    )
    return simulate(stages, load, config, return_s=plan.return_us / 1e6)


def _planned(plan: Plan, number: int) -> SimulatedStage:
    stage: StagePlan = plan.stages[number]
    per_token = stage.kv_bytes / plan.kv_tokens

    def step_s(batch: BatchShape) -> float:
        return stage.step_s(batch.tokens, batch.rows, batch.kv_tokens * per_token)

    def link_s(batch: BatchShape) -> float:
        # The first stage gets token ids, which are few bytes.
        return stage.link_s(batch.tokens * plan.hidden_bytes if number else 0)

    return SimulatedStage(step_s=step_s, link_s=link_s)

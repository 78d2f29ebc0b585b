"""Simulated serving against a real pipeline of three stages of unequal speed.

`python bench/simulation.py`. The simulation is told what the stages report of themselves
(`StepResult.forward_s`) under other loads than those that are compared, what a lone step takes
beside its stages, and the time of the control plane with stages that take none. It is told no
throughput. Prints JSON: tokens a second, times and busy shares, simulated and real, for one stream
and for twelve.

The loads that tell run before and after each that is compared, so that what else the machine does
weighs on both. Each stage has one thread, and the slowest about as much to do as all others, so
that two cores do for three stages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import queue
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from prometheus_client import CollectorRegistry

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness

from tightfit.cluster.deployment_status import ModelInfo
from tightfit.cluster.engine import Engine
from tightfit.cluster.launch import StageGroup
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.pipeline import Pipeline, StageChain
from tightfit.cluster.planning.rates import Curve, at
from tightfit.cluster.ray_session import RayOptions, RaySession
from tightfit.cluster.request import Request, SamplingParams
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.simulation import Load, SimulatedStage, Simulation, simulate
from tightfit.workers.api import MicroBatch, SampledToken, StageSpec, StepResult

LAYERS = ((0, 5), (5, 25), (25, 30))
"""Of SmolLM2-135M's 30, on each stage. The head, on the last, takes about as long as 8 layers."""
KV_BLOCKS = 1024
ONE = Load(streams=1, prompt=harness.PROMPT_TOKENS, output=96, requests=1)
FULL = Load(streams=12, prompt=harness.PROMPT_TOKENS, output=64, requests=12)
TELLING = (
    replace(ONE, output=48),
    replace(FULL, streams=6, requests=6, output=40),
    replace(FULL, streams=18, requests=18, output=32),
)
"""One, two and six sequences in a micro-batch; twelve streams are four."""
WARM_UP = replace(FULL, streams=4, requests=4, output=16)
CONTROL_STEPS = replace(FULL, output=256)
LEAST_STEPS = 5
"""Of so many tokens, for their mean to count; prompts' are on the line beyond the decodes'."""
START_LIMIT_S = 120.0
SCHEDULER = SchedulerConfig(
    num_blocks=KV_BLOCKS, max_context_tokens=2048, num_stages=len(LAYERS), enable_prefix_cache=False
)


def specs() -> list[StageSpec]:
    """The stages, one thread each."""
    return [
        StageSpec(
            model_path=str(harness.gguf()), stage_index=index, num_stages=len(LAYERS),
            first_layer=first, end_layer=end, format="int8", num_kv_blocks=KV_BLOCKS,
            num_threads=1,
        )
        for index, (first, end) in enumerate(LAYERS)
    ]  # fmt: skip


# -- what the simulation is told ---------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One that came back."""

    tokens: int
    forward_s: list[float]
    """Of each stage."""
    beside_s: float | None
    """All else, from its sending to its return; None where it met another."""


class Watched(StageChain):
    """Real stages, and what they report of each step.

    Args:
        stages: the real ones.
    """

    def __init__(self, stages: StageChain) -> None:
        self._stages = stages
        self._sent: deque[tuple[int, float, bool]] = deque()
        self.steps: list[Step] = []

    def send(self, batch: MicroBatch) -> None:
        """See `StageChain`."""
        self._sent.append((batch.num_tokens, time.perf_counter(), not self._sent))
        self._stages.send(batch)

    def receive(self, timeout_s: float | None) -> StepResult | None:
        """See `StageChain`."""
        result = self._stages.receive(timeout_s)
        if result is not None:
            tokens, sent_s, met_none = self._sent.popleft()
            beside_s = time.perf_counter() - sent_s - sum(result.forward_s)
            alone = met_none and not self._sent
            self.steps.append(
                Step(
                    tokens=tokens, forward_s=result.forward_s, beside_s=beside_s if alone else None
                )
            )
        return result

    def wake(self) -> None:
        """See `StageChain`."""
        self._stages.wake()

    def close(self) -> None:
        """See `StageChain`."""
        self._stages.close()


class InstantStages(StageChain):
    """Stages that take no time: what is left is the control plane's."""

    def __init__(self) -> None:
        self._results: queue.SimpleQueue[StepResult | None] = queue.SimpleQueue()
        self.steps = 0

    def send(self, batch: MicroBatch) -> None:
        """See `StageChain`."""
        self.steps += 1
        tokens = [
            SampledToken(sequence_id=part.sequence_id, token_id=7, logprob=-1.0)
            for part in batch.slices
            if part.sampling is not None
        ]
        self._results.put(StepResult(epoch=batch.epoch, step=batch.step, tokens=tokens))

    def receive(self, timeout_s: float | None) -> StepResult | None:
        """See `StageChain`."""
        try:
            return self._results.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def wake(self) -> None:
        """See `StageChain`."""
        self._results.put(None)

    def close(self) -> None:
        """Nothing is held."""


def control_s() -> float:
    """Seconds of the control plane for each step."""
    chain = InstantStages()
    engine = make_engine(chain)

    async def run() -> float:
        engine.start()
        await serve(engine, WARM_UP)
        before = chain.steps
        served = await serve(engine, CONTROL_STEPS)
        return served.elapsed_s / (chain.steps - before)

    try:
        return asyncio.run(run())
    finally:
        engine.stop()


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """All that the simulation is told."""

    stages: list[Curve]
    """Mean seconds of each stage's step, by tokens."""
    link_s: float
    """A share of what a lone step takes beside its stages: one for each link, and one back."""
    control_s: float

    @classmethod
    def by(cls, steps: Sequence[Step], control_s: float) -> Told:
        """What some steps say."""
        by_tokens: dict[int, list[Step]] = {}
        for step in steps:
            by_tokens.setdefault(step.tokens, []).append(step)
        often = {n: same for n, same in sorted(by_tokens.items()) if len(same) >= LEAST_STEPS}
        beside = [step.beside_s for step in steps if step.beside_s is not None]
        return cls(
            stages=[
                tuple((n, mean(step.forward_s[i] for step in same)) for n, same in often.items())
                for i in range(len(LAYERS))
            ],
            link_s=mean(beside) / (len(LAYERS) + 1),
            control_s=control_s,
        )

    def simulate(self, load: Load) -> Simulation:
        """Serve a load in simulated time."""
        stages = [
            SimulatedStage(
                step_s=lambda batch, curve=curve: at(curve, batch.tokens),
                link_s=lambda batch: self.link_s,
            )
            for curve in self.stages
        ]
        return simulate(stages, load, SCHEDULER, return_s=self.link_s, control_s=self.control_s)


# -- what really happens -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A load that was served."""

    elapsed_s: float
    tokens_per_s: float
    ttft_s: float
    """Mean."""
    itl_s: float
    """Mean."""
    busy: tuple[float, ...] = ()
    """Share of the time in which each stage computed."""


Rounds = list[tuple[tuple[Load, Served], list[Step]]]
"""Each load as it was served, and the steps that tell of the stages then."""


def make_engine(chain: StageChain) -> Engine:
    """The service's engine on some stages; not started."""
    pipeline = Pipeline(chain, max_in_flight=len(LAYERS))
    pipeline.begin_epoch(1)
    return Engine(
        Scheduler(SCHEDULER),
        pipeline,
        model=ModelInfo(
            name="smollm2", family="llama", num_layers=LAYERS[-1][1], vocab_size=49152,
            max_context_tokens=SCHEDULER.max_context, weight_format="int8",
            eos_token_ids=frozenset(), num_stages=len(LAYERS),
        ),
        metrics=Metrics(CollectorRegistry()),
    )  # fmt: skip


async def serve(engine: Engine, load: Load) -> Served:
    """All of a load's requests at once.

    Raises:
        SystemExit: a token was lost.
    """
    prompts = harness.prompts(load.requests)
    started = time.perf_counter()

    async def one(number: int) -> list[float]:
        sampling = SamplingParams(max_tokens=load.output, ignore_eos=True)
        request = Request(
            request_id=f"{started}-{number}", prompt_token_ids=tuple(prompts[number]),
            sampling=sampling,
        )  # fmt: skip
        stream = engine.submit(request)
        return [
            time.perf_counter() - started async for event in stream if event.token_id is not None
        ]

    times = await asyncio.gather(*(one(number) for number in range(load.requests)))
    if any(len(each) != load.output for each in times):
        raise SystemExit(f"tokens were lost: {[len(each) for each in times]}")
    elapsed_s = max(each[-1] for each in times)
    return Served(
        elapsed_s=elapsed_s,
        tokens_per_s=load.requests * load.output / elapsed_s,
        ttft_s=sum(each[0] for each in times) / len(times),
        itl_s=sum(each[-1] - each[0] for each in times) / (len(times) * (load.output - 1)),
    )


async def rounds(engine: Engine, group: StageGroup, watched: Watched, runs: int) -> Rounds:
    """So many times: each load that is compared, between loads that tell."""
    engine.start()
    await serve(engine, WARM_UP)
    told_by: list[list[Step]] = []
    found: list[tuple[Load, Served]] = []

    async def tell() -> list[Step]:
        first = len(watched.steps)
        for load in TELLING:
            await serve(engine, load)
        return watched.steps[first:]

    told = await tell()
    for load in (ONE, FULL) * runs:
        before = [status.busy_s for status in group.statuses()]
        served = await serve(engine, load)
        after = [status.busy_s for status in group.statuses()]
        busy = [(b - a) / served.elapsed_s for a, b in zip(before, after, strict=True)]
        found.append((load, replace(served, busy=tuple(busy))))
        later = await tell()
        told_by.append(told + later)
        told = later
    return list(zip(found, told_by, strict=True))


def serve_really(runs: int) -> Rounds:
    """The same, on a pipeline of Ray actors."""
    with ExitStack() as cleanup:
        session = RaySession(RayOptions(num_cpus=len(LAYERS), threads_per_stage=1))
        cleanup.callback(session.close)
        group = StageGroup(session, specs())
        cleanup.callback(group.close)
        group.place()
        group.load(timeout_s=START_LIMIT_S)
        watched = Watched(group.connect(epoch=1))
        engine = make_engine(watched)
        cleanup.callback(engine.stop)
        return asyncio.run(rounds(engine, group, watched, runs))


def compare(load: Load, simulated: Simulation, real: Served) -> dict[str, object]:
    """Side by side."""
    return {
        "streams": load.streams,
        "tokens_per_s": {"simulated": simulated.tokens_per_s, "real": real.tokens_per_s},
        "simulated_over_real": simulated.tokens_per_s / real.tokens_per_s,
        "ttft_ms": {"simulated": 1000 * simulated.ttft.mean_s, "real": 1000 * real.ttft_s},
        "itl_ms": {"simulated": 1000 * simulated.itl.mean_s, "real": 1000 * real.itl_s},
        "busy": {"simulated": simulated.busy, "real": real.busy},
    }


def measure(runs: int) -> dict[str, object]:
    """Each load so many times."""
    busy = harness.settle()
    control = control_s()
    found = []
    for (load, served), steps in serve_really(runs):
        told = Told.by(steps, control)
        found.append(
            {
                **compare(load, told.simulate(load), served),
                "step_of_one_token_ms": [1000 * at(curve, 1) for curve in told.stages],
                "link_us": 1e6 * told.link_s,
            }
        )
    return {
        "machine": harness.machine(), "busy_before": busy, "control_us": 1e6 * control,
        "runs": found,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="how often each load is compared")
    print(json.dumps(measure(parser.parse_args().runs), indent=1))

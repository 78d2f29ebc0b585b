"""A live page on a made-up deployment, for its tests and for pictures of it."""

from __future__ import annotations

import math
import time

from tightfit.cluster.deployment_status import DeploymentStatus, ModelInfo
from tightfit.cluster.monitor import Sample
from tightfit.cluster.scheduling.config import SchedulerCounts
from tightfit.workers.api import StageMemory, StageStatus

GIB = 2**30
LAYERS = 96


class MadeUp:
    """As `tightfit.cluster.monitor.Monitor`: the samples of a deployment that never was."""

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.health, self.reason = "ok", ""
        self.model = "opt-175b"
        self.age_s = 0.2
        self.num_waiting = 9
        self.weight_error = 0.0004
        self.is_known = True
        self.outages: list[tuple[float, float]] = []
        """From when to when the pipeline was lost, in seconds since the start, which was 180 s
        before; samples that old are two seconds apart, at even seconds."""
        self._started_s = time.monotonic() - 180

    def watch(self) -> tuple[Sample, ...]:
        if not self.is_known:
            return ()
        now_s = time.monotonic() - self.age_s
        times = [self._started_s + 2 * i for i in range(88)] + [now_s - 3.2, now_s - 1, now_s]
        return tuple(Sample(at_s=at, status=self._status(at - self._started_s)) for at in times)

    def _status(self, at_s: float) -> DeploymentStatus:
        is_lost = any(lost_s <= at_s < over_s for lost_s, over_s in self.outages)
        num_recoveries = sum(over_s <= at_s for _, over_s in self.outages)
        return DeploymentStatus(
            model=ModelInfo(
                name=self.model, family="opt", num_layers=LAYERS, vocab_size=50272,
                max_context_tokens=2048, weight_format="int4", eos_token_ids=frozenset({2}),
                num_stages=self.num_stages,
            ),
            health="recovering" if is_lost else self.health,
            reason="stage 1's process ended" if is_lost else self.reason,
            epoch=1 + num_recoveries, num_recoveries=num_recoveries,
            num_in_flight=self.num_stages, counts=self._counts(at_s),
            stages=tuple(self._stage(index, at_s) for index in range(self.num_stages)),
        )  # fmt: skip

    def _counts(self, at_s: float) -> SchedulerCounts:
        return SchedulerCounts(
            num_running=18, num_waiting=self.num_waiting, num_queued_tokens=9120, num_blocks=4096,
            num_blocks_used=2350 + int(300 * math.sin(at_s / 20)), num_blocks_cached=612,
            num_preemptions=3, num_prompt_tokens=int(300 * at_s + 400 * math.sin(at_s / 5)),
            num_generated_tokens=int(38 * at_s + 60 * math.sin(at_s / 9) + 200),
            num_cached_tokens=int(90 * at_s),
        )  # fmt: skip

    def _stage(self, index: int, at_s: float) -> StageStatus:
        first, end = LAYERS * index // self.num_stages, LAYERS * (index + 1) // self.num_stages
        predicted = int((end - first) * 0.89 * GIB)
        weights = int(predicted * (1 + self.weight_error))
        return StageStatus(
            stage_index=index, first_layer=first, end_layer=end, format="int4", kv_format="int8",
            device="cuda", node_id=f"{'a41c'[index // 4 % 4]}3f9c27e{'0' * 48}", pid=100 + index,
            epoch=1, steps=1000, busy_s=at_s * (0.62 + 0.25 * math.sin(2.1 * index)),
            uptime_s=at_s + 5,
            memory=StageMemory(
                predicted_weight_bytes=predicted, weight_bytes=weights,
                kv_cache_bytes=int(5.1 * GIB), workspace_bytes=int(0.7 * GIB),
                predicted_kv_cache_bytes=int(5.1 * GIB), rss_anon_bytes=0,
                loaded_gpu_bytes=weights + int(5.1 * GIB), num_kv_blocks=4096,
                budget_bytes=max(int(22.1 * GIB), weights + 6 * GIB),
                gpu_bytes=weights + int(5.9 * GIB),
            ),
        )  # fmt: skip

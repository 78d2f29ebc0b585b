"""What the live page shows, as JSON: pure, from samples of the deployment.

No prompt, no answer, no request's or client's name is in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tightfit.cluster.deployment_status import DeploymentStatus
from tightfit.cluster.monitor import Sample
from tightfit.workers.api import StageStatus

RATE_WINDOW_S = 3.0
"""Rates shown as "now" are means over at least so long, if there are samples for it."""
NODE_DIGITS = 8
"""Of Ray's node ids, which have 56, as many as tell nodes apart."""
LOST = ("recovering", "failed")
"""States in which nothing is served for want of a stage."""


def snapshot(samples: Sequence[Sample], now_s: float, now_unix_s: float) -> dict[str, Any]:
    """The deployment now and its recent past; all of it JSON.

    Args:
        samples: oldest first.
        now_s: on `time.monotonic`.
        now_unix_s: the same moment in Unix time.
    """
    if not samples:
        return {"is_known": False}
    last = samples[-1]
    status, before = last.status, _some_seconds_before(samples)
    counts = status.counts
    return {
        "is_known": True,
        "age_s": round(max(0.0, now_s - last.at_s), 2),
        "health": status.health,
        "reason": status.reason,
        "epoch": status.epoch,
        "recoveries": status.num_recoveries,
        "outages": [
            {
                "lost_unix_s": round(now_unix_s - now_s + outage.lost_s),
                "ago_s": round(now_s - outage.lost_s, 1),
                "took_s": round(
                    (now_s if outage.over_s is None else outage.over_s) - outage.lost_s
                ),
                "is_over": outage.over_s is not None,
                "bound": outage.bound,
                "reason": outage.reason,
            }
            for outage in _outages(samples)
        ],
        "model": _model(status),
        "load": {
            "running": counts.num_running,
            "waiting": counts.num_waiting,
            "queued_tokens": counts.num_queued_tokens,
            "kv_blocks": counts.num_blocks,
            "kv_blocks_used": counts.num_blocks_used,
            "kv_blocks_cached": counts.num_blocks_cached,
            "in_flight": status.num_in_flight,
            "preemptions": counts.num_preemptions,
            "prompt_tokens": counts.num_prompt_tokens,
            "cached_tokens": counts.num_cached_tokens,
            "generated_tokens": counts.num_generated_tokens,
        },
        "now": _rates(before, last),
        "history": _history(samples, now_s),
        "stages": [_stage(stage, before, last) for stage in status.stages],
    }


def _some_seconds_before(samples: Sequence[Sample]) -> Sample:
    """The sample that rates are taken from."""
    last = samples[-1]
    for sample in reversed(samples[:-1]):
        if last.at_s - sample.at_s >= RATE_WINDOW_S:
            return sample
    return samples[0]


def _model(status: DeploymentStatus) -> dict[str, Any]:
    model = status.model
    return {
        "name": model.name,
        "family": model.family,
        "layers": model.num_layers,
        "format": model.weight_format,
        "context": model.max_context_tokens,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outage:
    """A time without a pipeline, to within the time between two samples."""

    lost_s: float
    """On `time.monotonic`, as is `over_s`."""
    over_s: float | None
    """None: it goes on."""
    bound: str
    """Which is its length: "about" that, "at most" or "at least"."""
    reason: str
    """Why the pipeline was lost; empty: not known."""


def _outages(samples: Sequence[Sample]) -> list[_Outage]:
    """As far back as samples go, oldest first. Of one that came and went between two samples only
    the count of recoveries tells."""
    found: list[_Outage] = []
    first: Sample | None = None  # of those that saw the one that goes on
    for before, sample in pairwise((samples[0], *samples)):
        has_recovered = sample.status.num_recoveries > before.status.num_recoveries
        is_lost = sample.status.health in LOST
        if first is not None and (has_recovered or not is_lost):
            found.append(_outage(first, before, samples[0], over_s=sample.at_s))
            first = None
        elif has_recovered:
            found.append(
                _Outage(lost_s=before.at_s, over_s=sample.at_s, bound="at most", reason="")
            )
        if is_lost and first is None:
            first = sample
    if first is not None:
        found.append(_outage(first, samples[-1], samples[0], over_s=None))
    return found


def _outage(first: Sample, last: Sample, oldest: Sample, *, over_s: float | None) -> _Outage:
    """The one that the samples from `first` to `last` saw."""
    bound = "at least" if first is oldest else "about"
    return _Outage(lost_s=first.at_s, over_s=over_s, bound=bound, reason=last.status.reason)


def _rates(before: Sample, after: Sample) -> dict[str, float]:
    """Tokens per second between two samples; 0 where a count began anew."""
    seconds = after.at_s - before.at_s
    first, then = before.status.counts, after.status.counts

    def rate(rise: int) -> float:
        return round(max(0, rise) / seconds, 2) if seconds > 0 else 0.0

    return {
        "generated_per_s": rate(then.num_generated_tokens - first.num_generated_tokens),
        "prompt_per_s": rate(then.num_prompt_tokens - first.num_prompt_tokens),
    }


def _history(samples: Sequence[Sample], now_s: float) -> list[list[float]]:
    """For each sample but the first: seconds before now, generated and prompt tokens per second
    since the one before, sequences running and waiting."""
    rows = []
    for before, after in pairwise(samples):
        rates, counts = _rates(before, after), after.status.counts
        rows.append(
            [
                round(now_s - after.at_s, 1),
                rates["generated_per_s"],
                rates["prompt_per_s"],
                counts.num_running,
                counts.num_waiting,
            ]
        )
    return rows


def _stage(stage: StageStatus, before: Sample, after: Sample) -> dict[str, Any]:
    memory = stage.memory
    return {
        "index": stage.stage_index,
        "first_layer": stage.first_layer,
        "end_layer": stage.end_layer,
        "format": stage.format,
        "kv_format": stage.kv_format,
        "device": stage.device,
        "node": stage.node_id[:NODE_DIGITS],
        "steps": stage.steps,
        "busy_share": round(_busy_share(stage, before, after), 4),
        "memory": {
            "predicted_weight_bytes": memory.predicted_weight_bytes,
            "weight_bytes": memory.weight_bytes,
            "kv_cache_bytes": memory.kv_cache_bytes,
            "workspace_bytes": memory.workspace_bytes,
            "host_bytes": memory.host_bytes,
            "total_bytes": memory.total_bytes,
            "budget_bytes": memory.budget_bytes,
            "differences": list(memory.differences),
            "process_bytes": memory.gpu_bytes or memory.rss_anon_bytes,
        },
    }


def _busy_share(stage: StageStatus, before: Sample, after: Sample) -> float:
    """Share of the time between two samples that the stage computed; since its start, if it was
    not there before."""
    seconds = after.at_s - before.at_s
    earlier = next(
        (
            s
            for s in before.status.stages
            if (s.stage_index, s.pid) == (stage.stage_index, stage.pid)
        ),
        None,
    )
    if earlier is None or seconds <= 0:
        share = stage.busy_s / stage.uptime_s if stage.uptime_s > 0 else 0.0
    else:
        share = (stage.busy_s - earlier.busy_s) / seconds
    return min(1.0, max(0.0, share))

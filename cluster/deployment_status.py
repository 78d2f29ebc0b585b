"""What a deployment is, and how it is now."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.cluster.scheduling.config import SchedulerCounts
from tightfit.workers.api import StageStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What is served."""

    name: str
    """Name that requests may carry."""
    family: str
    num_layers: int
    vocab_size: int
    max_context_tokens: int
    """Prompt and output together, at most."""
    weight_format: str
    eos_token_ids: frozenset[int]
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentStatus:
    """A snapshot of the whole deployment."""

    model: ModelInfo
    health: str
    """"ok", "idle", "stalled", "recovering", "failed" or "draining"."""
    reason: str
    """Why it recovers or is failed; empty otherwise."""
    epoch: int
    num_in_flight: int
    counts: SchedulerCounts
    stages: tuple[StageStatus, ...]
    better_plan: str = ""
    """What a restart would make better; empty: nothing that is known."""
    num_recoveries: int = 0
    """Since the service started."""

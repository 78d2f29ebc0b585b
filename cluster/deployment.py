"""`tightfit serve`: from a checkpoint and a configuration to a service that answers, and back to nothing."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.engine import Engine, ModelInfo
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway.server import GatewayServer
from tightfit.cluster.launch import (
    RayOptions,
    RaySession,
    StageGroup,
    describe_model,
    resolve_model,
)
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.pipeline import LinkedStages, Pipeline
from tightfit.cluster.planning.memory import plan_stages
from tightfit.cluster.progress import LoadView
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.cluster.tokenizer import Tokenizer, load_tokenizer
from tightfit.kernels.formats import Format
from tightfit.workers.api import StageSpec, StageStatus
from tightfit.workers.decoder_config import DecoderConfig

log = logging.getLogger(__name__)

FIRST_EPOCH = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A replica whose stages hold their shards and are wired."""

    group: StageGroup
    links: LinkedStages
    statuses: tuple[StageStatus, ...]


def stage_specs(config: ServeConfig, model_path: Path, model: DecoderConfig) -> list[StageSpec]:
    """The stages, layers split by bytes.

    Raises:
        PlacementError: more stages than layers, or a shard over its budget.
    """
    ranges = plan_stages(
        model,
        Format(config.format),
        num_stages=config.stages,
        budget_bytes=config.memory_budget_bytes,
    )
    return [
        StageSpec(
            model_path=str(model_path),
            stage_index=index,
            num_stages=len(ranges),
            first_layer=first,
            end_layer=end,
            format=config.format,
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

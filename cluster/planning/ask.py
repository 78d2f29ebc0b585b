"""From settings to what the planner is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tightfit.cluster.config import PlanConfig
from tightfit.cluster.planning.inventory import Inventory
from tightfit.cluster.planning.memory import Reserve
from tightfit.cluster.planning.plan import Plan, parse_formats
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.request import PlanRequest, Spare
from tightfit.cluster.planning.sensitive import with_best_mix
from tightfit.kernels.formats import Format, KVFormat
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import AUTO
from tightfit.workers.sensitivity import load_sensitivities

DEFAULT_CONTEXT = 2048
BITS_ROUNDED_BY = 0.0001
"""In a plan."""


def plan_request(config: PlanConfig, model: DecoderConfig, inventory: Inventory) -> PlanRequest:
    """What the planner is asked.

    Args:
        config: what to plan.
        model: for which model.
        inventory: the devices that may be used.

    Raises:
        ConfigError, PlacementError: a setting makes no sense for this model, or the sensitivities
            cannot be used.
    """
    places = ("host", "device") if config.embedding_place == AUTO else (config.embedding_place,)
    default = (AUTO,) if model.stored is not None else (str(Format.INT4), str(Format.INT8))
    request = PlanRequest(
        model=model,
        inventory=_with_reserve(config, inventory),
        sequences=config.sequences,
        context=config.context or min(DEFAULT_CONTEXT, model.max_position),
        formats=config.format_names or default,
        is_mixed=config.mixed,
        head_format=config.head_format,
        kv_formats=config.kv_format_names,
        embedding_places=places,
        min_bits=config.min_bits,
        spare=Spare(config.spare),
        objective=Objective(config.objective),
        max_devices=config.max_devices,
        max_dollars=config.max_cost,
        exclude=config.excluded,
        same_node=config.same_node,
        pins=config.pinned,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
    )
    if config.sensitivity is None:
        return request
    return with_best_mix(request, load_sensitivities(Path(config.sensitivity)), config.max_loss)


def request_of(plan: Plan, model: DecoderConfig, inventory: Inventory) -> PlanRequest:
    """What a plan answers, as far as the plan tells: as many bits per weight at least, and room for
    as much. Limits on devices are not in it.

    Args:
        plan: for this model.
        model: the decoder.
        inventory: the devices that may be used.
    """
    words = {fmt for stage in plan.stages for fmt, _ in parse_formats(stage.formats)}
    kv = str(KVFormat.INT8) if plan.kv_format == KVFormat.INT8 else AUTO
    return PlanRequest(
        model=model,
        inventory=inventory,
        sequences=plan.sequences,
        context=plan.context,
        formats=tuple(sorted(words)),
        is_mixed=len(words) > 1,
        head_format=plan.head_format,
        kv_formats=(kv,),
        embedding_places=tuple(dict.fromkeys((plan.embedding_place, "host"))),
        min_bits=max(0.0, plan.bits_per_weight - BITS_ROUNDED_BY),
        block_size=plan.block_size,
        max_batch_tokens=plan.max_batch_tokens,
    )


def _with_reserve(config: PlanConfig, inventory: Inventory) -> Inventory:
    if config.reserve is None:
        return inventory
    return dataclasses.replace(inventory, reserve=Reserve(config.reserve))

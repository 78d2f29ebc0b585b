"""What every stage of a service is told, and on which device it is to run: by the operator's own
number of stages, or by a plan."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.errors import ConfigError, PlacementError
from tightfit.cluster.model import ModelDescription
from tightfit.cluster.nodes import NODE_LABEL, Node
from tightfit.cluster.planning.memory import plan_stages, stage_bytes
from tightfit.cluster.planning.plan import Plan, StagePlan, parse_formats
from tightfit.cluster.units import format_bytes
from tightfit.kernels.formats import SUPPORTED_FORMATS, KVFormat
from tightfit.workers.api import StageSpec
from tightfit.workers.model_formats import AUTO, ModelFormats, model_formats
from tightfit.workers.probing.result import PresentDevice
from tightfit.workers.shard_bytes import gpu_reserve_bytes

SAME_WITHIN = 0.02
"""Of a plan's bytes: what a stage takes may differ so much before the plan counts as another's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A model, cut into stages."""

    config: ServeConfig
    """With what the plan says in the place of what was left open."""
    formats: ModelFormats
    specs: tuple[StageSpec, ...]
    """First to last."""
    plan: Plan | None = None
    """None: Ray chooses the devices."""


def chosen_formats(
    config: ServeConfig, model: ModelDescription, layers: Sequence[str] = ()
) -> ModelFormats:
    """The formats of the model's parts.

    Args:
        config: of the service.
        model: to serve.
        layers: one for each layer, where a plan says so.

    Raises:
        ConfigError: they do not go together.
    """
    try:
        return model_formats(
            model.config,
            layers or config.format,
            head=config.head_format,
            kv=config.kv_format,
            embedding_place=config.embedding_place,
            outlier_threshold=config.llm_int8_threshold,
            device=config.device,
        )
    except ValueError as error:
        raise ConfigError(f"head_format: {error}") from error


def by_number(config: ServeConfig, model: ModelDescription) -> Placement:
    """As many stages as `config.stages` says, layers split by bytes.

    Raises:
        ConfigError: formats that do not go together.
        PlacementError: more stages than layers, or a shard over its budget.
    """
    threads = config.threads_per_stage
    if threads is None:
        cores = len(os.sched_getaffinity(0)) if config.ray_address is None else 1
        threads = max(1, cores // (config.stages or 1))
    place = "device" if config.embedding_place == AUTO else config.embedding_place
    config = dataclasses.replace(config, threads_per_stage=threads, embedding_place=place)
    formats = chosen_formats(config, model)
    ranges = plan_stages(
        model.config,
        formats,
        num_stages=config.stages or 1,
        budget_bytes=config.memory_budget_bytes,
        kv_blocks=config.kv_blocks,
        block_size=config.block_size,
        max_batch_tokens=config.max_batch_tokens,
        balance=config.balance,
    )
    specs = [
        dataclasses.replace(
            _spec(config, model, index, len(ranges)),
            first_layer=first,
            end_layer=end,
            memory_budget_bytes=config.memory_budget_bytes,
            max_kv_blocks=config.max_kv_blocks,
            max_context=config.max_context,
            max_sequences=config.max_running_sequences,
        )
        for index, (first, end) in enumerate(ranges)
    ]
    return Placement(config=config, formats=formats, specs=tuple(specs))


def by_plan(config: ServeConfig, model: ModelDescription, plan: Plan) -> Placement:
    """The stages that a plan lists.

    Raises:
        ConfigError: the configuration says otherwise than the plan.
        PlacementError: the plan is of another model, or needs a checkpoint that this one is not.
    """
    config = _with_plan(config, plan)
    layers = _layer_formats(plan)
    if len(layers) != model.config.num_layers:
        raise PlacementError(
            f"the plan is for {plan.model}, of {plan.num_layers} layers, and {config.model_name} "
            f"has {model.config.num_layers}: plan this model"
        )
    formats = chosen_formats(config, model, layers)
    for index, stage in enumerate(plan.stages):
        _check_bytes(model, formats, plan, index, stage)
    uniform = len(set(layers)) == 1
    specs = [
        dataclasses.replace(
            _spec(config, model, index, len(plan.stages)),
            first_layer=stage.first_layer,
            end_layer=stage.end_layer,
            format=layers[0] if uniform else config.format,
            layer_formats=[] if uniform else layers,
            planned_device=stage.device,
            memory_budget_bytes=stage.usable_bytes,
            max_kv_blocks=min(config.max_kv_blocks, plan.kv_blocks),
        )
        for index, stage in enumerate(plan.stages)
    ]
    return Placement(config=config, formats=formats, specs=tuple(specs), plan=plan)


def _spec(config: ServeConfig, model: ModelDescription, index: int, count: int) -> StageSpec:
    """What all stages have in common."""
    return StageSpec(
        model_path=str(model.path),
        stage_index=index,
        num_stages=count,
        first_layer=0,
        end_layer=0,
        format=config.format,
        head_format=config.head_format,
        kv_format=config.kv_format,
        embedding_place=config.embedding_place,
        llm_int8_threshold=config.llm_int8_threshold,
        device=config.device,
        block_size=config.block_size,
        num_kv_blocks=config.kv_blocks,
        max_batch_tokens=config.max_batch_tokens,
        num_threads=config.threads_per_stage,
    )


def _with_plan(config: ServeConfig, plan: Plan) -> ServeConfig:
    """The configuration, what a plan decides being as it says.

    Raises:
        ConfigError: it says otherwise itself.
    """
    formats = {fmt for stage in plan.stages for fmt, _ in parse_formats(stage.formats)}
    kv = str(KVFormat.INT8) if plan.kv_format == KVFormat.INT8 else AUTO
    for name, planned in (
        ("format", formats),
        ("head_format", {plan.head_format}),
        ("kv_format", {kv}),
        ("embedding_place", {plan.embedding_place}),
    ):
        said = getattr(config, name)
        if said != AUTO and {said} != planned:
            raise ConfigError(
                f"serve.{name} is {said}, and the plan says {', '.join(sorted(planned))}: leave "
                "it out, or plan anew"
            )
    if config.memory_budget_bytes is not None:
        raise ConfigError("serve.memory_budget: each stage's is in the plan; leave it out")
    return dataclasses.replace(
        config,
        head_format=plan.head_format,
        kv_format=kv,
        embedding_place=plan.embedding_place,
        device="cuda" if plan.stages[0].kind == "gpu" else "cpu",
        block_size=plan.block_size,
        max_batch_tokens=plan.max_batch_tokens,
    )


def _layer_formats(plan: Plan) -> list[str]:
    """Of each layer of the model.

    Raises:
        PlacementError: one is none that a stage could make of this checkpoint.
    """
    layers = [
        fmt for stage in plan.stages for fmt, n in parse_formats(stage.formats) for _ in range(n)
    ]
    known = (AUTO, *map(str, SUPPORTED_FORMATS))
    for fmt in layers:
        if fmt == "mix":
            raise PlacementError(
                "the plan mixes formats inside layers, by sensitivities: write it with "
                "`tightfit quantize --budget`, and plan it (--formats auto)"
            )
        if fmt not in known:
            raise PlacementError(f"the plan has a layer in {fmt}, which is not one of {known}")
    return layers


def _check_bytes(
    model: ModelDescription, formats: ModelFormats, plan: Plan, index: int, stage: StagePlan
) -> None:
    """A plan is a promise of bytes: for a model that takes others it is none."""
    needed = stage_bytes(
        model.config,
        formats,
        stage.first_layer,
        stage.end_layer,
        kv_blocks=plan.kv_blocks,
        block_size=plan.block_size,
        max_batch_tokens=plan.max_batch_tokens,
    )
    for name, here, planned in (
        ("weights", needed.weights, stage.weight_bytes),
        ("KV cache", needed.kv_cache, stage.kv_bytes),
    ):
        if abs(here - planned) > SAME_WITHIN * planned:
            raise PlacementError(
                f"the plan is not for this model: stage {index} on {stage.device} is to have "
                f"{format_bytes(planned)} of {name}, and of {model.path.name} it would have "
                f"{format_bytes(here)}. Plan it anew"
            )


# -- devices ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where one stage is to run."""

    ray_node_id: str
    gpu_uuid: str | None
    """None: a CPU."""


def place_on_devices(
    placement: Placement, nodes: Sequence[Node], devices: Mapping[str, Sequence[PresentDevice]]
) -> tuple[list[StageSpec], list[Place]]:
    """The stages of a planned placement on the devices that are there now: how much of its device
    each may take, and how many threads.

    Args:
        placement: with a plan.
        nodes: of the cluster, alive.
        devices: of each node, by its name, as they are now.

    Raises:
        PlacementError: a device is gone, or has no longer the room that the plan needs on it.
    """
    plan = placement.plan
    assert plan is not None
    by_name = {node.name: node for node in nodes}
    found = [find_device(i, stage, devices) for i, stage in enumerate(plan.stages)]
    on_node = Counter(stage.node for stage in plan.stages)
    specs = []
    for spec, stage, device in zip(placement.specs, plan.stages, found, strict=True):
        threads = spec.num_threads or max(1, by_name[stage.node].free_cpus // on_node[stage.node])
        room = _room_now(plan, spec.stage_index, device)
        specs.append(
            dataclasses.replace(
                spec, num_threads=threads, memory_budget_bytes=min(stage.usable_bytes, room)
            )
        )
    places = [
        Place(ray_node_id=by_name[stage.node].ray_id, gpu_uuid=device.uuid)
        for stage, device in zip(plan.stages, found, strict=True)
    ]
    return specs, places


def find_device(
    index: int, stage: StagePlan, devices: Mapping[str, Sequence[PresentDevice]]
) -> PresentDevice:
    """The device that a stage is planned on, as it is now.

    Raises:
        PlacementError: its node or the device is not there.
    """
    what = f"stage {index} is planned on {stage.device} ({stage.type})"
    if stage.node not in devices:
        raise PlacementError(
            f"{what}, and the cluster has no node {stage.node} now; it has: "
            f"{', '.join(devices) or 'none'}. A node is called by its label {NODE_LABEL}, else by "
            "its host name. Start it, or plan anew"
        )
    alike = [device for device in devices[stage.node] if device.kind == stage.kind]
    for number, device in enumerate(alike):
        is_it = device.uuid == stage.uuid if stage.uuid else number == stage.number
        if is_it or stage.kind == "cpu":
            return device
    uuid = f" with UUID {stage.uuid}" if stage.uuid else ""
    raise PlacementError(
        f"{what}, and {stage.node} has no such device{uuid} now: it has {len(alike)} usable "
        f"{stage.kind}(s). Look at it with nvidia-smi there, or plan anew"
    )


def _room_now(plan: Plan, index: int, device: PresentDevice) -> int:
    """What one stage may take of its device now; stages on one host share what is free there.

    Raises:
        PlacementError: it is less than the stage needs.
    """
    stage = plan.stages[index]
    if stage.kind == "gpu":
        sharing = [stage]
        free = max(0, device.free_bytes - gpu_reserve_bytes(device.total_bytes))
    else:
        sharing = [s for s in plan.stages if (s.node, s.kind) == (stage.node, stage.kind)]
        free = device.free_bytes
    needed = sum(needed_bytes(plan, each) for each in sharing)
    if free < needed:
        raise PlacementError(
            f"stage {index} is planned on {stage.device} ({stage.type}), and of {stage.node}'s "
            f"{'device' if stage.kind == 'gpu' else 'memory'} {format_bytes(free)} are free now, "
            f"of {format_bytes(needed)} that are needed there for weights, workspace and "
            f"{plan.sequences} × {plan.context} tokens. Another process has taken the memory since "
            "it was measured: end it, or plan anew"
        )
    mine = needed_bytes(plan, stage)
    return mine + (free - needed) // len(sharing)


def needed_bytes(plan: Plan, stage: StagePlan) -> int:
    """What a stage takes with a KV cache as large as the workload wants it, and no larger."""
    blocks = min(plan.kv_blocks, plan.sequences * -(-plan.context // plan.block_size))
    return stage.weight_bytes + stage.workspace_bytes + stage.kv_bytes * blocks // plan.kv_blocks

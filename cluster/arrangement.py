"""From a model and the devices that are there to stages, each on its device: before Ray is
started what can be said before, and then the rest."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tightfit.cluster.config import PlanConfig, ServeConfig
from tightfit.cluster.errors import PlacementError
from tightfit.cluster.model import ModelDescription
from tightfit.cluster.nodes import Node, alive_nodes, look_at_nodes, measure_nodes
from tightfit.cluster.placement import (
    Place,
    Placement,
    by_number,
    by_plan,
    place_on_devices,
)
from tightfit.cluster.planning.ask import plan_request, request_of
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.explain import why_not
from tightfit.cluster.planning.inventory import Inventory
from tightfit.cluster.planning.plan import Plan, read_plan
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.report import headline
from tightfit.cluster.planning.request import PlanRequest
from tightfit.cluster.ray_session import RaySession
from tightfit.cluster.surroundings import live_inventory
from tightfit.cluster.units import format_bytes
from tightfit.kernels.formats import Format
from tightfit.workers.api import StageSpec, StageStatus
from tightfit.workers.model_formats import AUTO

ROOM_POLL_S: Final = 3.0
NVIDIA_DRIVER: Final = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """The stages of a service, ready to be started."""

    placement: Placement
    specs: tuple[StageSpec, ...]
    places: tuple[Place, ...] = ()
    """The device of each stage; none: Ray chooses."""
    request: PlanRequest | None = None
    """What the plan answers; None where there is none."""

    @property
    def config(self) -> ServeConfig:
        """With what was decided."""
        return self.placement.config


def arrange_early(config: ServeConfig, model: ModelDescription) -> Placement | None:
    """The stages, where their number or a plan is given; None: the devices have to be measured.

    Raises:
        ConfigError, PlacementError: see `by_number`, `by_plan`, `read_plan`.
    """
    if config.plan is not None:
        return by_plan(config, model, read_plan(Path(config.plan)))
    if config.stages is None:
        return None
    if config.device == AUTO and config.ray_address is None and not NVIDIA_DRIVER.exists():
        config = dataclasses.replace(config, device="cpu")
    return by_number(config, model)


def arrange(
    session: RaySession,
    config: ServeConfig,
    model: ModelDescription,
    early: Placement | None,
    plan_config: PlanConfig | None,
) -> Arrangement:
    """The stages on the devices of the cluster.

    Args:
        session: connected.
        config: of the service.
        model: to serve.
        early: of `arrange_early`.
        plan_config: how to plan, where `early` is None.

    Raises:
        ConfigError: the settings make no sense for this model.
        PlacementError: the model does not fit, or a device is gone; see `place_on_devices`.
    """
    if early is not None and early.plan is None:
        if early.config.device == AUTO:
            device = "cuda" if session.has_gpus else "cpu"
            early = by_number(dataclasses.replace(early.config, device=device), model)
        return Arrangement(placement=early, specs=early.specs)
    if early is not None:
        assert early.plan is not None
        request = request_of(early.plan, model.config, Inventory(devices=()))
        return _on_devices(session, alive_nodes(), early, request)
    assert plan_config is not None
    found, request, nodes = _plan_when_there_is_room(session, config, model, plan_config)
    print(f"planned: {headline(found)}", file=sys.stderr)
    # What the plan was made by is in the plan.
    config = dataclasses.replace(config, memory_budget_bytes=None)
    return _on_devices(session, nodes, by_plan(config, model, found), request)


def _plan_when_there_is_room(
    session: RaySession, config: ServeConfig, model: ModelDescription, plan_config: PlanConfig
) -> tuple[Plan, PlanRequest, Sequence[Node]]:
    """A plan for the devices that there are, and the nodes. In a cluster of others, where nodes may
    join and services end, room is waited for.

    Raises:
        PlacementError: the model does not fit, nor did it within `placement_timeout_s`.
    """
    limit_s = 0.0 if session.is_private else session.options.placement_timeout_s
    deadline = time.monotonic() + limit_s
    said = None
    while True:
        try:
            nodes = alive_nodes()
            return *_plan_now(config, model, plan_config, nodes), nodes
        except PlacementError as error:
            if time.monotonic() >= deadline:
                raise
            reason = str(error).partition("\n")[0]
        if reason != said:
            said = reason
            print(f"{reason} (waiting up to {limit_s:g} s for room)", file=sys.stderr)
        time.sleep(min(ROOM_POLL_S, max(0.0, deadline - time.monotonic())))


def _plan_now(
    config: ServeConfig, model: ModelDescription, plan_config: PlanConfig, nodes: Sequence[Node]
) -> tuple[Plan, PlanRequest]:
    if plan_config.formats == AUTO and model.config.stored is None:
        plan_config = dataclasses.replace(plan_config, formats=str(Format.INT8))
    probes, between = measure_nodes(nodes, config.device)
    inventory = live_inventory(
        probes,
        config.device,
        between=between,
        cpu_budget_bytes=config.memory_budget_bytes,
    )
    request = plan_request(plan_config, model.config, inventory)
    solution = solve(request)
    if solution is None:
        raise PlacementError(why_not(config.model_name, request))
    return make_plan(config.model_name, request, solution), request


def _on_devices(
    session: RaySession,
    nodes: Sequence[Node],
    placement: Placement,
    request: PlanRequest,
) -> Arrangement:
    plan = placement.plan
    assert plan is not None
    wanted = {stage.node for stage in plan.stages}
    if session.is_private and len(wanted) == 1:
        # The one node of a private cluster is this machine, whatever the plan calls it.
        nodes = [dataclasses.replace(node, name=min(wanted)) for node in nodes]
    concerned = [node for node in nodes if node.name in wanted]
    kinds = frozenset(stage.kind for stage in plan.stages)
    devices = {node.name: () for node in nodes} | look_at_nodes(concerned, kinds)
    specs, places = place_on_devices(placement, nodes, devices)
    for spec, stage in zip(specs, plan.stages, strict=True):
        print(
            f"stage {spec.stage_index}: layers {stage.first_layer}-{stage.end_layer - 1} "
            f"({stage.formats}) on {stage.device} ({stage.type}), "
            f"{format_bytes(stage.weight_bytes)} of weights in "
            f"{format_bytes(spec.memory_budget_bytes or 0)}",
            file=sys.stderr,
        )
    return Arrangement(
        placement=placement, specs=tuple(specs), places=tuple(places), request=request
    )


def compare(arrangement: Arrangement, statuses: Sequence[StageStatus]) -> list[str]:
    """What was planned for each stage and what it has now, a line each; none without a plan."""
    plan = arrangement.placement.plan
    if plan is None:
        return []
    blocks = min(status.memory.num_kv_blocks for status in statuses)
    lines = []
    for stage, status in zip(plan.stages, statuses, strict=True):
        memory = status.memory
        planned = stage.weight_bytes + stage.workspace_bytes
        measured = memory.weight_bytes + memory.workspace_bytes
        left = (memory.budget_bytes or stage.usable_bytes) - memory.total_bytes
        lines.append(
            f"stage {status.stage_index} on {stage.device}: planned {format_bytes(planned)} beside "
            f"its KV cache, has {format_bytes(measured)} ({(measured - planned) / planned:+.1%}); "
            f"{format_bytes(max(0, left))} left"
        )
    tokens = blocks * plan.block_size
    lines.append(f"KV cache for {tokens:,} tokens on every stage; planned {plan.kv_tokens:,}")
    return lines

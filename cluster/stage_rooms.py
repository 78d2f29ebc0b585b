"""Room for stages in the Ray cluster, and their processes there."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.placement import Place
from tightfit.cluster.ray_session import RayOptions
from tightfit.workers.actor import StageActor
from tightfit.workers.api import StageSpec
from tightfit.workers.logs import log_environment

log = logging.getLogger(__name__)

Relocate = Callable[[int, Sequence[StageSpec], Sequence[Place]], tuple[StageSpec, Place]]
"""(which stage, specs and places of all) → where it is to start anew; the same place: there."""

NODE_ID_LABEL = "ray.io/node-id"
"""That Ray gives each node."""
SPIN_COUNT = 30_000
"""GOMP_SPINCOUNT of a stage: how often a waiting OpenMP thread looks before it sleeps. By libgomp's
own default of 300,000 the threads of a finished forward hold their cores for about a millisecond,
while the engine on the same host wants one to send the next. Too few, and they sleep between the
operations of one forward, each of which then waits for the kernel to wake them. Measured with one
stage on both of 2 cores, ms between forwards | first token of 20: 300,000 0.70 | 28; 30,000 0.46 |
29; 10,000 0.40 | 37; 1,000 0.41 | 46."""


def _stage_environment(threads: int, gpu_uuid: str | None) -> dict[str, str]:
    """Variables of a stage's process; libgomp reads its own once, before the first operation.

    Ray counts GPUs, and would give a stage any one of its node: a stage that is planned on a
    certain one sees that one, and Ray is told to leave the variable alone.
    """
    spin = os.environ.get("GOMP_SPINCOUNT", str(SPIN_COUNT))
    environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin, "PYTHONSAFEPATH": "1"}
    environment |= log_environment()
    if gpu_uuid is not None:
        environment["CUDA_VISIBLE_DEVICES"] = f"GPU-{gpu_uuid.removeprefix('GPU-')}"
        environment["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"] = "1"
    return environment


def has_several_nodes() -> bool:
    """The cluster has more than this one, so that links need TCP."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1


def _amounts(resources: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)


class StageRooms:
    """What Ray has reserved for the stages of one replica.

    Args:
        options: of the connection to Ray.
        specs: the stages, first to last.
        places: the device of each; none: Ray chooses, by its strategy.
        run_dir: of this replica, for its Unix sockets.
        relocate: where a stage that has a place is to start anew; None: where it was.
    """

    def __init__(
        self,
        options: RayOptions,
        specs: Sequence[StageSpec],
        *,
        places: Sequence[Place],
        run_dir: str,
        relocate: Relocate | None,
    ) -> None:
        self._options, self._run_dir, self._relocate = options, run_dir, relocate
        self.specs, self._places = list(specs), list(places)
        self.has_moved = False
        """Some stage is not where it was placed first."""
        self._groups: list[PlacementGroup] = []
        """For all stages at first, and for each that moved."""
        self._bundles: list[tuple[PlacementGroup, int]] = []
        """Of each stage: in which of them, and where there."""

    def reserve(self) -> None:
        """Room for every stage, or for none.

        Raises:
            PlacementError: the cluster has none within the time limit.
        """
        group = self._reserve(self.specs, self._places)
        self._bundles = [(group, index) for index in range(len(self.specs))]

    def _reserve(self, specs: Sequence[StageSpec], places: Sequence[Place]) -> PlacementGroup:
        group = placement_group(
            [self._amounts_of(spec) for spec in specs],
            self._options.strategy if not places else "PACK",
            bundle_label_selector=[{NODE_ID_LABEL: place.ray_node_id} for place in places] or None,
        )
        self._groups.append(group)
        if not group.wait(self._options.placement_timeout_s):
            self._give_back(group)
            raise PlacementError(self._why_none(specs, places))
        return group

    def _give_back(self, group: PlacementGroup) -> None:
        self._groups.remove(group)
        remove_placement_group(group)

    def _amounts_of(self, spec: StageSpec) -> dict[str, float]:
        """What Ray reserves for a stage."""
        gpus = {"GPU": 1.0} if spec.device.startswith("cuda") else {}
        return {"CPU": self._threads(spec), **gpus}

    def _threads(self, spec: StageSpec) -> int:
        return spec.num_threads or self._options.threads_per_stage

    def start(self, index: int) -> Any:
        """A stage's process, in its room; the handle of its `StageActor`."""
        spec = self.specs[index]
        amounts = self._amounts_of(spec)
        group, number = self._bundles[index]
        uuid = self._places[index].gpu_uuid if self._places else None
        actor_class = ray.remote(StageActor)
        return actor_class.options(
            num_cpus=amounts["CPU"],
            num_gpus=amounts.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=number
            ),
            runtime_env={"env_vars": _stage_environment(self._threads(spec), uuid)},
        ).remote(spec, self._run_dir, has_several_nodes())

    def move_if_its_device_is_gone(self, index: int) -> None:
        """Of a stage with a place. For others Ray itself finds another node.

        Raises:
            PlacementError: it could go nowhere.
        """
        if not self._places or self._relocate is None:
            return
        spec, place = self._relocate(index, self.specs, self._places)
        if place == self._places[index]:
            return
        before, _ = self._bundles[index]
        self._bundles[index] = (self._reserve([spec], [place]), 0)
        if before is not self._groups[0]:
            self._give_back(before)
        self.specs[index], self._places[index], self.has_moved = spec, place, True
        log.warning("stage %d moves to %s", index, spec.planned_device)

    def why_none(self, indices: Sequence[int]) -> str:
        """What some stages wait for, and what the cluster has."""
        places = [self._places[index] for index in indices] if self._places else []
        return self._why_none([self.specs[index] for index in indices], places)

    def _why_none(self, specs: Sequence[StageSpec], places: Sequence[Place]) -> str:
        bundles = [self._amounts_of(spec) for spec in specs]
        names = sorted({name for bundle in bundles for name in bundle})
        where = [f" on {_node_of(place)}" for place in places] or [""] * len(specs)
        wanted = "; ".join(
            f"stage {spec.stage_index}: {_amounts(bundle, names)}{on}"
            for spec, bundle, on in zip(specs, bundles, where, strict=True)
        )
        free = ray.available_resources()
        there = "; ".join(
            f"{node['NodeManagerAddress']}: {_amounts(node['Resources'], names)}"
            for node in ray.nodes()
            if node["Alive"]
        )
        how = "" if places else f" ({self._options.strategy})"
        return (
            f"no room for {len(specs)} stage(s){how} within "
            f"{self._options.placement_timeout_s:g} s: {wanted}. The cluster has {there}; "
            f"free now: {_amounts(free, names)}. Add a node, end what holds them, or ask for fewer "
            "stages or threads"
        )

    def close(self) -> None:
        """Give all of it back."""
        for group in list(self._groups):
            self._give_back(group)


def _node_of(place: Place) -> str:
    found = [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == place.ray_node_id]
    return found[0] if found else "a node that is gone"

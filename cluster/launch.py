"""Starts stages as Ray actors, wires them, watches them, ends them."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from tightfit.cluster.errors import PlacementError, UnavailableError
from tightfit.cluster.pipeline import LinkedStages
from tightfit.cluster.placement import Place
from tightfit.cluster.ray_session import RaySession
from tightfit.workers.actor import StageActor
from tightfit.workers.api import LoadProgress, StageSpec, StageStatus
from tightfit.workers.errors import WorkerError
from tightfit.workers.logs import log_environment

log = logging.getLogger(__name__)

NODE_ID_LABEL = "ray.io/node-id"
"""That Ray gives each node."""
CONTROL_TIMEOUT_S = 30.0
PROGRESS_POLL_S = 0.25
RESTART_PAUSE_S = 1.0
FENCE_TIMEOUT_S = 15.0
"""For the step that a stage is in: one that takes longer is ended. A full link takes 10."""
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


def _has_several_nodes() -> bool:
    return len([node for node in ray.nodes() if node["Alive"]]) > 1


def _has_ended(ref: Any, deadline: float) -> bool:
    """The call has come back, well or not, before `time.monotonic` is at the deadline."""
    done, _ = ray.wait([ref], timeout=max(0.0, deadline - time.monotonic()))
    return bool(done)


def _amounts(resources: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)


class StageGroup:
    """The stages of one replica, from placement to end.

    Args:
        session: a connection to Ray.
        specs: the stages, first to last.
        places: the device of each; none: Ray chooses, by its strategy.
        on_lost: called once in an epoch, from a thread, with the reason and the epoch, when a
            stage ends unasked.
        relocate: where the stage with this index is to start anew; None: where it was.
    """

    def __init__(
        self,
        session: RaySession,
        specs: Sequence[StageSpec],
        *,
        places: Sequence[Place] = (),
        on_lost: Callable[[str, int], None] | None = None,
        relocate: Callable[[int], tuple[StageSpec, Place]] | None = None,
    ) -> None:
        self._session = session
        self.specs = list(specs)
        self.places = list(places)
        self.has_moved = False
        """Some stage is not where it was placed first."""
        self._on_lost, self._relocate = on_lost, relocate
        self._rooms: list[PlacementGroup] = []
        """What Ray has reserved: for all stages at first, and for each that moved."""
        self._bundles: list[tuple[PlacementGroup, int]] = []
        """Of each stage: in which of them, and where there."""
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._links: LinkedStages | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._run_dir = tempfile.mkdtemp(prefix="tf-run-")
        self._node_id = ray.get_runtime_context().get_node_id()

    # -- placement ---------------------------------------------------------------------------

    def place(self) -> None:
        """Reserve room for every stage and start its process.

        Raises:
            PlacementError: the cluster has no room within the time limit.
        """
        room = self._reserve(self.specs, self.places)
        self._bundles = [(room, index) for index in range(len(self.specs))]
        self._actors = [self._start_actor(index) for index in range(len(self.specs))]

    def _reserve(self, specs: Sequence[StageSpec], places: Sequence[Place]) -> PlacementGroup:
        """Room for these stages together."""
        options = self._session.options
        room = placement_group(
            [self._bundle(spec) for spec in specs],
            options.strategy if not places else "PACK",
            bundle_label_selector=[{NODE_ID_LABEL: place.ray_node_id} for place in places] or None,
        )
        self._rooms.append(room)
        if not room.wait(options.placement_timeout_s):
            raise PlacementError(self._why_no_room(specs))
        return room

    def _bundle(self, spec: StageSpec) -> dict[str, float]:
        """What Ray reserves for a stage."""
        gpus = {"GPU": 1.0} if spec.device.startswith("cuda") else {}
        return {"CPU": self._threads(spec), **gpus}

    def _threads(self, spec: StageSpec) -> int:
        return spec.num_threads or self._session.options.threads_per_stage

    def _why_no_room(self, specs: Sequence[StageSpec]) -> str:
        bundles = [self._bundle(spec) for spec in specs]
        names = sorted({name for bundle in bundles for name in bundle})
        wanted = "; ".join(
            f"stage {spec.stage_index}: {_amounts(bundle, names)}"
            + (f" on {self._node_of(spec.stage_index)}" if self.places else "")
            for spec, bundle in zip(specs, bundles, strict=True)
        )
        free = ray.available_resources()
        there = "; ".join(
            f"{node['NodeManagerAddress']}: {_amounts(node['Resources'], names)}"
            for node in ray.nodes()
            if node["Alive"]
        )
        how = "" if self.places else f" ({self._session.options.strategy})"
        return (
            f"no room for {len(specs)} stage(s){how} within "
            f"{self._session.options.placement_timeout_s:g} s: {wanted}. The cluster has {there}; "
            f"free now: {_amounts(free, names)}. Add a node, end what holds them, or ask for fewer "
            "stages or threads"
        )

    def _node_of(self, index: int) -> str:
        ray_id = self.places[index].ray_node_id
        found = [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == ray_id]
        return found[0] if found else "a node that is gone"

    def _start_actor(self, index: int) -> Any:
        spec = self.specs[index]
        bundle = self._bundle(spec)
        room, number = self._bundles[index]
        uuid = self.places[index].gpu_uuid if self.places else None
        actor_class = ray.remote(StageActor)
        return actor_class.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                room, placement_group_bundle_index=number
            ),
            runtime_env={"env_vars": _stage_environment(self._threads(spec), uuid)},
        ).remote(spec, self._run_dir, _has_several_nodes())

    # -- loading -----------------------------------------------------------------------------

    def load(
        self,
        *,
        timeout_s: float,
        progress: Callable[[int, LoadProgress], None] | None = None,
    ) -> list[StageStatus]:
        """Load every stage at once; returns what each measures then.

        Raises:
            WorkerError: a stage could not load; its own words.
            UnavailableError: a stage's process ended, or the time limit passed.
        """
        return self._load(range(len(self.specs)), timeout_s, progress)

    def _load(
        self,
        indices: Sequence[int],
        timeout_s: float,
        progress: Callable[[int, LoadProgress], None] | None,
    ) -> list[StageStatus]:
        """Load some stages; see `load`."""
        deadline = time.monotonic() + timeout_s
        loads = {self._actors[index].load.remote(): index for index in indices}
        pending = list(loads)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=PROGRESS_POLL_S)
            if progress is not None:
                self._report(indices, progress)
            for ref in done:
                self._result(ref, loads[ref])
            if pending and time.monotonic() > deadline:
                late = ", ".join(str(loads[ref]) for ref in pending)
                raise UnavailableError(f"stage(s) {late} did not load within {timeout_s:g} s")
        return [self._result(ref, index) for ref, index in loads.items()]

    def _report(
        self, indices: Sequence[int], progress: Callable[[int, LoadProgress], None]
    ) -> None:
        for index in indices:
            try:
                now = ray.get(self._actors[index].progress.remote(), timeout=CONTROL_TIMEOUT_S)
            except ray.exceptions.RayError:
                continue  # its load reports the reason
            progress(index, now)

    def _result(self, ref: Any, index: int) -> Any:
        """A control call's result, with Ray's wrapping taken off its errors."""
        try:
            return ray.get(ref, timeout=CONTROL_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, WorkerError):
                raise type(cause)(*cause.__reduce__()[1]) from None
            raise UnavailableError(f"stage {index} failed: {cause!r}") from error
        except ray.exceptions.GetTimeoutError as error:
            raise UnavailableError(
                f"stage {index} did not answer within {CONTROL_TIMEOUT_S:g} s"
            ) from error
        except ray.exceptions.ActorUnavailableError as error:
            raise UnavailableError(f"stage {index} cannot be reached: {error}") from error
        except ray.exceptions.RayActorError as error:
            raise UnavailableError(f"stage {index}'s process ended: {error}") from error

    # -- running -----------------------------------------------------------------------------

    def connect(self, *, epoch: int) -> LinkedStages:
        """Wire the links, first stage to last and back to us, and let the stages run."""
        self._links = LinkedStages(
            run_dir=self._run_dir,
            node_id=self._node_id,
            tcp_host=ray.util.get_node_ip_address() if _has_several_nodes() else None,
        )
        self._wire(self._links, epoch)
        return self._links

    def _wire(self, ours: LinkedStages, epoch: int) -> None:
        endpoints = [
            self._result(actor.endpoint.remote(), index) for index, actor in enumerate(self._actors)
        ]
        onwards, upstreams = [*endpoints[1:], ours.endpoint], [ours.endpoint, *endpoints[:-1]]
        for index, (onward, upstream) in enumerate(zip(onwards, upstreams, strict=True)):
            wired = self._actors[index].connect.remote(onward, epoch, upstream.public_key)
            self._result(wired, index)
        ours.connect(endpoints[0], last_key=endpoints[-1].public_key)
        self._runs = [actor.run.remote() for actor in self._actors]
        self._watcher = threading.Thread(
            target=self._watch, args=(self._runs, epoch), name="stage-watch", daemon=True
        )
        self._watcher.start()

    def _watch(self, runs: Sequence[Any], epoch: int) -> None:
        """Report the first stage whose `run` ends before we ask for it."""
        while not self._closing.is_set() and self._runs is runs:
            done, _ = ray.wait(runs, num_returns=1, timeout=0.5)
            if done and not self._closing.is_set() and self._runs is runs:
                self._lost(runs.index(done[0]), done[0], epoch)
                return

    def _lost(self, index: int, run: Any, epoch: int) -> None:
        try:
            self._result(run, index)
            reason = f"stage {index} ended"
        except (WorkerError, UnavailableError) as error:
            reason = str(error).splitlines()[0].rstrip(".")
        if self._on_lost is not None:
            self._on_lost(reason, epoch)

    def recover(
        self,
        *,
        epoch: int,
        timeout_s: float,
        progress: Callable[[int, LoadProgress], None] | None = None,
    ) -> list[StageStatus]:
        """Start those stages anew that are lost, and wire all for a new epoch; what each measures
        then. The others keep their shards. May be called again when it has failed.

        Nobody else may use the links meanwhile.

        Args:
            epoch: later than any before.
            timeout_s: for loading.
            progress: of those that load.

        Raises:
            PlacementError: there is no room for one.
            WorkerError, UnavailableError: see `load`.
        """
        assert self._links is not None, "not connected yet"
        lost = self._fence()
        self._start_anew(lost)
        self._load(lost, timeout_s, progress)
        self._wire(self._links, epoch)
        return self.statuses()

    def _fence(self) -> list[int]:
        """Let every stage end its run; those that cannot, or whose process is gone, are lost."""
        runs, self._runs = self._runs, []
        deadline = time.monotonic() + FENCE_TIMEOUT_S
        for actor in self._actors:
            actor.pause.remote()
        lost = {index for index, run in enumerate(runs) if not _has_ended(run, deadline)}
        for index, actor in enumerate(self._actors):
            try:
                if runs and index not in lost:
                    self._result(runs[index], index)
                self._result(actor.status.remote(), index)
            except (WorkerError, UnavailableError):
                lost.add(index)
        return sorted(lost)

    def _move_if_its_device_is_gone(self, index: int) -> None:
        """Of a stage with a place. For others Ray itself finds another node."""
        if not self.places or self._relocate is None:
            return
        spec, place = self._relocate(index)
        if place == self.places[index]:
            return
        self._bundles[index] = (self._reserve([spec], [place]), 0)
        self.specs[index], self.places[index], self.has_moved = spec, place, True
        log.warning("stage %d moves to %s", index, spec.planned_device)

    def _start_anew(self, lost: Sequence[int]) -> None:
        """New processes for these stages. One that ends at once is started again, as a node may be
        dead before Ray knows it, which then places the stage there once more.

        Raises:
            PlacementError, UnavailableError: one is not there within the time limit for placement.
        """
        deadline = time.monotonic() + self._session.options.placement_timeout_s
        while lost:
            for index in lost:
                ray.kill(self._actors[index])
                self._move_if_its_device_is_gone(index)
                log.info("stage %d starts anew", index)
                self._actors[index] = self._start_actor(index)
            signs = {index: self._actors[index].progress.remote() for index in lost}
            if not all(_has_ended(sign, deadline) for sign in signs.values()):
                raise PlacementError(self._why_no_room([self.specs[index] for index in lost]))
            lost = [
                index for index, sign in signs.items() if not self._is_up(index, sign, deadline)
            ]

    def _is_up(self, index: int, sign: Any, deadline: float) -> bool:
        """A stage's process answers; False: it has ended, and may be started again."""
        try:
            self._result(sign, index)
        except UnavailableError:
            if time.monotonic() + RESTART_PAUSE_S > deadline:
                raise
            time.sleep(RESTART_PAUSE_S)
            return False
        return True

    def statuses(self) -> list[StageStatus]:
        """What every stage reports of itself now."""
        refs = [actor.status.remote() for actor in self._actors]
        return [self._result(ref, index) for index, ref in enumerate(refs)]

    def close(self) -> None:
        """End every stage and give its room back."""
        self._closing.set()
        stops = [actor.stop.remote() for actor in self._actors]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=2)
        if self._watcher is not None:
            self._watcher.join(timeout=2)
        for actor in self._actors:
            ray.kill(actor)
        for room in self._rooms:
            remove_placement_group(room)
        shutil.rmtree(self._run_dir, ignore_errors=True)

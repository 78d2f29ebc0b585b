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


def _amounts(resources: Mapping[str, float], names: Sequence[str]) -> str:
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)


class StageGroup:
    """The stages of one replica, from placement to end.

    Args:
        session: a connection to Ray.
        specs: the stages, first to last.
        places: the device of each; none: Ray chooses, by its strategy.
        on_lost: called once, from a thread, with the reason, when a stage ends unasked.
    """

    def __init__(
        self,
        session: RaySession,
        specs: Sequence[StageSpec],
        *,
        places: Sequence[Place] = (),
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self._session = session
        self.specs = tuple(specs)
        self._places = tuple(places)
        self._on_lost = on_lost
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._runs: list[Any] = []
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
        options = self._session.options
        bundles = [self._bundle(spec) for spec in self.specs]
        selectors = [{NODE_ID_LABEL: place.ray_node_id} for place in self._places]
        self._group = placement_group(
            [dict(bundle) for bundle in bundles],
            options.strategy if not selectors else "PACK",
            bundle_label_selector=selectors or None,
        )
        if not self._group.wait(options.placement_timeout_s):
            raise PlacementError(self._why_no_room(bundles))
        nodes = [node for node in ray.nodes() if node["Alive"]]
        several = len(nodes) > 1
        for index, bundle in enumerate(bundles):
            self._actors.append(self._start_actor(index, bundle, several))

    def _bundle(self, spec: StageSpec) -> dict[str, float]:
        """What Ray reserves for a stage."""
        gpus = {"GPU": 1.0} if spec.device.startswith("cuda") else {}
        return {"CPU": self._threads(spec), **gpus}

    def _threads(self, spec: StageSpec) -> int:
        return spec.num_threads or self._session.options.threads_per_stage

    def _why_no_room(self, bundles: Sequence[dict[str, float]]) -> str:
        names = sorted({name for bundle in bundles for name in bundle})
        wanted = "; ".join(
            f"stage {index}: {_amounts(bundle, names)}"
            + (f" on {self._node_of(index)}" if self._places else "")
            for index, bundle in enumerate(bundles)
        )
        free = ray.available_resources()
        there = "; ".join(
            f"{node['NodeManagerAddress']}: {_amounts(node['Resources'], names)}"
            for node in ray.nodes()
            if node["Alive"]
        )
        how = "" if self._places else f" ({self._session.options.strategy})"
        return (
            f"no room for {len(self.specs)} stage(s){how} within "
            f"{self._session.options.placement_timeout_s:g} s: {wanted}. The cluster has {there}; "
            f"free now: {_amounts(free, names)}. Add a node, end what holds them, or ask for fewer "
            "stages or threads"
        )

    def _node_of(self, index: int) -> str:
        ray_id = self._places[index].ray_node_id
        found = [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == ray_id]
        return found[0] if found else "a node that is gone"

    def _start_actor(self, index: int, bundle: dict[str, float], tcp: bool) -> Any:
        spec = self.specs[index]
        uuid = self._places[index].gpu_uuid if self._places else None
        actor_class = ray.remote(StageActor)
        return actor_class.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=4,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=index
            ),
            runtime_env={"env_vars": _stage_environment(self._threads(spec), uuid)},
        ).remote(spec, self._run_dir, tcp)

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
        deadline = time.monotonic() + timeout_s
        loads = [actor.load.remote() for actor in self._actors]
        pending = list(loads)
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=PROGRESS_POLL_S)
            self._report(progress)
            for ref in done:
                self._result(ref, loads.index(ref))
            if pending and time.monotonic() > deadline:
                late = ", ".join(str(loads.index(ref)) for ref in pending)
                raise UnavailableError(f"stage(s) {late} did not load within {timeout_s:g} s")
        return [self._result(ref, index) for index, ref in enumerate(loads)]

    def _report(self, progress: Callable[[int, LoadProgress], None] | None) -> None:
        if progress is None:
            return
        for index, actor in enumerate(self._actors):
            try:
                progress(index, ray.get(actor.progress.remote(), timeout=CONTROL_TIMEOUT_S))
            except ray.exceptions.RayError:
                continue  # its load reports the reason

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
        except ray.exceptions.RayActorError as error:
            raise UnavailableError(f"stage {index}'s process ended: {error}") from error

    # -- running -----------------------------------------------------------------------------

    def connect(self, *, epoch: int) -> LinkedStages:
        """Wire the links, first stage to last and back to us, and let the stages run."""
        several = len([node for node in ray.nodes() if node["Alive"]]) > 1
        ours = LinkedStages(
            run_dir=self._run_dir,
            node_id=self._node_id,
            tcp_host=ray.util.get_node_ip_address() if several else None,
        )
        endpoints = [
            self._result(actor.endpoint.remote(), index) for index, actor in enumerate(self._actors)
        ]
        onwards, upstreams = [*endpoints[1:], ours.endpoint], [ours.endpoint, *endpoints[:-1]]
        for index, (onward, upstream) in enumerate(zip(onwards, upstreams, strict=True)):
            wired = self._actors[index].connect.remote(onward, epoch, upstream.public_key)
            self._result(wired, index)
        ours.connect(endpoints[0], last_key=endpoints[-1].public_key)
        self._runs = [actor.run.remote() for actor in self._actors]
        self._watcher = threading.Thread(target=self._watch, name="stage-watch", daemon=True)
        self._watcher.start()
        return ours

    def _watch(self) -> None:
        """Report the first stage whose `run` ends before we ask for it."""
        while not self._closing.is_set():
            done, _ = ray.wait(self._runs, num_returns=1, timeout=0.5)
            if done and not self._closing.is_set():
                self._lost(self._runs.index(done[0]), done[0])
                return

    def _lost(self, index: int, run: Any) -> None:
        try:
            self._result(run, index)
            reason = f"stage {index} ended"
        except (WorkerError, UnavailableError) as error:
            reason = str(error).splitlines()[0]
        if self._on_lost is not None:
            self._on_lost(reason)

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
        if self._group is not None:
            remove_placement_group(self._group)
        shutil.rmtree(self._run_dir, ignore_errors=True)

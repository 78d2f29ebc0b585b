"""Loads stages, wires them, watches them, brings lost ones back, ends them."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from tightfit.cluster.errors import PlacementError, UnavailableError
from tightfit.cluster.pipeline import LinkedStages
from tightfit.cluster.placement import Place
from tightfit.cluster.ray_session import RaySession
from tightfit.cluster.stage_rooms import Relocate, StageRooms, has_several_nodes
from tightfit.workers.api import LoadProgress, StageSpec, StageStatus
from tightfit.workers.errors import WorkerError

log = logging.getLogger(__name__)

CONTROL_TIMEOUT_S = 30.0
PROGRESS_POLL_S = 0.25
RESTART_PAUSE_S = 1.0
FENCE_TIMEOUT_S = 15.0
"""For the step that a stage is in: one that takes longer is ended. A full link takes 10."""


def _has_ended(ref: Any, deadline: float, check: Callable[[], None]) -> bool:
    """The call has come back, well or not, before `time.monotonic` is at the deadline; `check` may
    raise meanwhile."""
    while True:
        check()
        left_s = max(0.0, deadline - time.monotonic())
        done, _ = ray.wait([ref], timeout=min(left_s, PROGRESS_POLL_S))
        if done or not left_s:
            return bool(done)


class StageGroup:
    """The stages of one replica, from placement to end.

    Args:
        session: a connection to Ray.
        specs: the stages, first to last.
        places: the device of each; none: Ray chooses, by its strategy.
        on_lost: called once in an epoch, from a thread, with the reason and the epoch, when a
            stage ends unasked.
        relocate: see `StageRooms`.
    """

    def __init__(
        self,
        session: RaySession,
        specs: Sequence[StageSpec],
        *,
        places: Sequence[Place] = (),
        on_lost: Callable[[str, int], None] | None = None,
        relocate: Relocate | None = None,
    ) -> None:
        self._run_dir = tempfile.mkdtemp(prefix="tf-run-")
        self._rooms = StageRooms(
            session.options, specs, places=places, run_dir=self._run_dir, relocate=relocate
        )
        self._timeout_s = session.options.placement_timeout_s
        self._on_lost = on_lost
        self._actors: list[Any] = []
        self._runs: list[Any] = []
        self._links: LinkedStages | None = None
        self._closing = threading.Event()
        self._watcher: threading.Thread | None = None
        self._node_id = ray.get_runtime_context().get_node_id()

    # -- placement ---------------------------------------------------------------------------

    def place(self) -> None:
        """Reserve room for every stage and start its process.

        Raises:
            PlacementError: the cluster has no room within the time limit.
        """
        self._rooms.reserve()
        self._actors = [self._rooms.start(index) for index in range(len(self._rooms.specs))]

    @property
    def has_moved(self) -> bool:
        """Some stage is not where it was placed first."""
        return self._rooms.has_moved

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
        return self._load(range(len(self._actors)), timeout_s, progress)

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
            tcp_host=ray.util.get_node_ip_address() if has_several_nodes() else None,
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
        check: Callable[[], None],
    ) -> list[StageStatus]:
        """Start those stages anew that are lost, and wire all for a new epoch; what each measures
        then. The others keep their shards. May be called again when it has failed.

        Nobody else may use the links meanwhile.

        Args:
            epoch: later than any before.
            timeout_s: for loading.
            check: called often; may raise, to end it.

        Raises:
            PlacementError: there is no room for one.
            WorkerError, UnavailableError: see `load`.
        """
        assert self._links is not None, "not connected yet"
        lost = self._fence(check)
        self._start_anew(lost, check)
        self._load(lost, timeout_s, lambda index, progress: check())
        self._wire(self._links, epoch)
        return self.statuses()

    def _fence(self, check: Callable[[], None]) -> list[int]:
        """Let every stage end its run; those that cannot, or whose process is gone, are lost."""
        runs, self._runs = self._runs, []
        deadline = time.monotonic() + FENCE_TIMEOUT_S
        for actor in self._actors:
            actor.pause.remote()
        lost = {index for index, run in enumerate(runs) if not _has_ended(run, deadline, check)}
        for index, actor in enumerate(self._actors):
            try:
                if runs and index not in lost:
                    self._result(runs[index], index)
                self._result(actor.status.remote(), index)
            except (WorkerError, UnavailableError):
                lost.add(index)
        return sorted(lost)

    def _start_anew(self, lost: Sequence[int], check: Callable[[], None]) -> None:
        """New processes for these stages. One that ends at once is started again, as a node may be
        dead before Ray knows it, which then places the stage there once more.

        Raises:
            PlacementError, UnavailableError: one is not there within the time limit for placement.
        """
        deadline = time.monotonic() + self._timeout_s
        while lost:
            for index in lost:
                ray.kill(self._actors[index])
                self._rooms.move_if_its_device_is_gone(index)
                log.info("stage %d starts anew", index)
                self._actors[index] = self._rooms.start(index)
            signs = {index: self._actors[index].progress.remote() for index in lost}
            if not all(_has_ended(sign, deadline, check) for sign in signs.values()):
                raise PlacementError(self._rooms.why_none(lost))
            lost = [
                index for index, sign in signs.items() if not self._is_up(index, sign, deadline)
            ]
            if lost:
                time.sleep(RESTART_PAUSE_S)

    def _is_up(self, index: int, sign: Any, deadline: float) -> bool:
        """A stage's process answers; False: it has ended, and may be started again."""
        try:
            self._result(sign, index)
        except UnavailableError:
            if time.monotonic() + RESTART_PAUSE_S > deadline:
                raise
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
        self._rooms.close()
        shutil.rmtree(self._run_dir, ignore_errors=True)

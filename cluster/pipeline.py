"""Micro-batches in flight: numbered, sent to the first stage, received from the last."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol

from tightfit.cluster.errors import UnavailableError
from tightfit.workers.api import MicroBatch, SequenceSlice, StepResult
from tightfit.workers.errors import LinkError
from tightfit.workers.link import Endpoint, Receiver, Sender, StepMessage
from tightfit.workers.link_keys import LinkKeys


class StageChain(Protocol):
    """The stages as the pipeline sees them: a FIFO. Tests put a model of it here."""

    def send(self, batch: MicroBatch) -> None:
        """Hand a micro-batch to the first stage."""

    def receive(self, timeout_s: float | None) -> StepResult | None:
        """The next result of the last stage; None at the time limit or after `wake`."""

    def wake(self) -> None:
        """Make a waiting `receive` return; from any thread."""

    def close(self) -> None:
        """Release what it holds."""


class LinkedStages:
    """The stage chain over links: ours to the first stage, the last stage's to us.

    Args:
        run_dir: directory for our Unix socket.
        node_id: this host's identity in the cluster.
        tcp_host: address to listen on for a last stage on another host; None: same host only.
    """

    def __init__(self, *, run_dir: str, node_id: str, tcp_host: str | None) -> None:
        self._node_id = node_id
        self._sender: Sender | None = None
        self._keys = LinkKeys.new()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._results = Receiver(
            StepResult, run_dir=run_dir, name="results", node_id=node_id, tcp_host=tcp_host,
            keys=self._keys,
        )  # fmt: skip
        self._results.watch(self._wake_fd)

    @property
    def endpoint(self) -> Endpoint:
        """Where the last stage sends its results."""
        return self._results.endpoint

    def connect(self, first_stage: Endpoint, *, last_key: str) -> None:
        """Send to this first stage from now on, and hear only the last stage, by its key."""
        if self._sender is not None:
            self._sender.close()
        self._results.admit(last_key)
        self._sender = Sender(first_stage, node_id=self._node_id, keys=self._keys)

    def send(self, batch: MicroBatch) -> None:
        """See `StageChain`.

        Raises:
            UnavailableError: not connected, or the first stage takes nothing.
        """
        if self._sender is None:
            raise UnavailableError("the pipeline has no first stage")
        try:
            self._sender.send(StepMessage(batch=batch))
        except LinkError as error:
            raise UnavailableError(f"the first stage is not reachable: {error}") from error

    def receive(self, timeout_s: float | None) -> StepResult | None:
        """See `StageChain`."""
        received = self._results.receive(timeout_s)
        if received is None:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake_fd)
            return None
        return received[0]

    def wake(self) -> None:
        """See `StageChain`."""
        os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """See `StageChain`."""
        if self._sender is not None:
            self._sender.close()
        self._results.close()
        os.close(self._wake_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A micro-batch that is on its way."""

    step: int
    slices: tuple[SequenceSlice, ...]
    sent_s: float
    """time.perf_counter when it was sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A micro-batch that came back."""

    slices: tuple[SequenceSlice, ...]
    result: StepResult
    wall_s: float
    """From its sending to its result's arrival."""
    alone: bool
    """It met no other micro-batch on its way: `wall_s` less the stages' time is overhead."""


class Pipeline:
    """Numbers the steps of one epoch and keeps the order of what is in flight.

    Args:
        stages: where micro-batches go.
        max_in_flight: micro-batches under way at once, at least the number of stages to keep all
        busy.
    """

    def __init__(self, stages: StageChain, *, max_in_flight: int) -> None:
        self._stages = stages
        self._max_in_flight = max_in_flight
        self._in_flight: deque[InFlight] = deque()
        self._met_another: set[int] = set()
        self._epoch = 0
        self._next_step = 0

    @property
    def epoch(self) -> int:
        """Generation of the replica."""
        return self._epoch

    @property
    def num_in_flight(self) -> int:
        """Micro-batches under way."""
        return len(self._in_flight)

    @property
    def has_room(self) -> bool:
        """Another micro-batch may be sent."""
        return len(self._in_flight) < self._max_in_flight

    @property
    def oldest_age_s(self) -> float:
        """Seconds since the oldest micro-batch under way was sent; 0 when there is none."""
        try:
            return time.perf_counter() - self._in_flight[0].sent_s
        except IndexError:
            return 0.0

    def begin_epoch(self, epoch: int) -> None:
        """Forget what is in flight; results of other epochs will be ignored."""
        self._epoch, self._next_step = epoch, 0
        self._in_flight.clear()
        self._met_another.clear()

    def submit(self, slices: tuple[SequenceSlice, ...]) -> None:
        """Send one micro-batch."""
        step = self._next_step
        if self._in_flight:
            self._met_another.update((step, *(flight.step for flight in self._in_flight)))
        flight = InFlight(step=step, slices=slices, sent_s=time.perf_counter())
        self._stages.send(MicroBatch(epoch=self._epoch, step=step, slices=list(slices)))
        self._in_flight.append(flight)
        self._next_step += 1

    def next_result(self, timeout_s: float | None) -> Completed | None:
        """Wait for the oldest micro-batch; None at the time limit, after `wake`, or for a stale
        result.

        Raises:
            UnavailableError: a stage reported that it could not compute the step.
        """
        result = self._stages.receive(timeout_s)
        if result is None or result.epoch != self._epoch:
            return None
        if result.error is not None:
            raise UnavailableError(result.error)
        flight = self._in_flight.popleft()
        if flight.step != result.step:
            raise UnavailableError(
                f"the last stage answered step {result.step} where step {flight.step} was due"
            )
        alone = flight.step not in self._met_another
        self._met_another.discard(flight.step)
        return Completed(
            slices=flight.slices,
            result=result,
            wall_s=time.perf_counter() - flight.sent_s,
            alone=alone,
        )

    def wake(self) -> None:
        """Make a waiting `next_result` return; from any thread."""
        self._stages.wake()

    def close(self) -> None:
        """Close the stage chain."""
        self._stages.close()

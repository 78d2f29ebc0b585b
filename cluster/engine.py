"""The loop that serves: schedule → submit → apply → stream.

One thread owns the pipeline. Requests enter from the event loop and their tokens go back to it, one
hand-over per step. The scheduler is shared under one lock, held for well under a millisecond.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from tightfit.cluster.deployment_status import DeploymentStatus, ModelInfo
from tightfit.cluster.errors import InvalidRequestError, UnavailableError
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.pipeline import Completed, Pipeline
from tightfit.cluster.request import FinishReason, Loss, Recovery, Request, StepTiming, TokenEvent
from tightfit.cluster.request_stream import RequestStream
from tightfit.cluster.scheduling.batching import Scheduler
from tightfit.workers.api import StageStatus

log = logging.getLogger(__name__)

DEADLINE_POLL_S = 0.05
IDLE_POLL_S = 1.0
STALL_S = 60.0
RESTART_AFTER_S = 300.0
"""So long a lost pipeline may fail to come back before a restart is thought to help: it plans anew
for what is left, but ends the stages that still hold their weights."""


News = tuple[RequestStream, TokenEvent]


class Engine:
    """Serves requests on one pipeline.

    Args:
        scheduler: decides what runs next; used by this engine only.
        pipeline: connected to loaded stages.
        model: what is served.
        metrics: where to count.
        stage_statuses: asks the stages for their state; may be called from any thread.
        stall_s: seconds without a result, with work in flight, after which health is "stalled".
        num_traced_steps: of each request, steps whose times are kept for its trace.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pipeline: Pipeline,
        *,
        model: ModelInfo,
        metrics: Metrics,
        stage_statuses: Callable[[], Sequence[StageStatus]] = tuple,
        stall_s: float = STALL_S,
        num_traced_steps: int = 0,
    ) -> None:
        self.model_info = model
        self.better_plan = ""
        """See `DeploymentStatus`; set from any thread."""
        self._scheduler = scheduler
        self._pipeline = pipeline
        self._metrics = metrics
        self._stage_statuses = stage_statuses
        self._stall_s = stall_s
        self._num_traced_steps = num_traced_steps
        self._lock = threading.Lock()
        self._streams: dict[str, RequestStream] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure = ""
        self._loss: Loss | None = None
        self._on_lost: Callable[[str, int], None] | None = None
        self._num_recoveries = 0
        self._draining = False
        self._stopping = threading.Event()
        self._parked, self._may_go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- in the event loop -------------------------------------------------------------------

    def start(self) -> None:
        """Begin to serve; call in the event loop that will read the streams."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, request: Request) -> RequestStream:
        """Queue a request.

        Raises:
            OverloadedError: a queue is full.
            InvalidRequestError: it can never run here.
            UnavailableError: the pipeline has failed, or the service is draining.
        """
        if self._draining:
            raise UnavailableError("the service is shutting down and takes no new requests")
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequestError(
                "request_id", f"{request_id!r} is in use by a running request"
            )
        stream = RequestStream(self, request)
        with self._lock:
            stream.loss = self._loss
            # Here, not before: nobody would end what is added after `fail` has ended all there was.
            if self._failure:
                raise UnavailableError(self._failure)
            events = self._scheduler.add(request, time.monotonic())
            self._streams[request_id] = stream
            news = self._addressed(events)
        self._dispatch(news)
        self._pipeline.wake()
        return stream

    def _addressed(self, events: Sequence[TokenEvent]) -> list[News]:
        """Events with the streams that wait for them. Call it under the lock under which the
        scheduler made them: later, the request's id may be another's."""
        pairs = ((self._streams.get(event.request_id), event) for event in events)
        return [(stream, event) for stream, event in pairs if stream is not None]

    def _dispatch(self, news: Sequence[News]) -> None:
        """Give events to their streams; in the event loop."""
        for stream, event in news:
            stream.push(event)
            if stream.has_every_end and self._streams.get(event.request_id) is stream:
                del self._streams[event.request_id]

    # -- from any thread ---------------------------------------------------------------------

    def cancel(self, stream: RequestStream, reason: FinishReason) -> None:
        """End a request; does nothing when it has ended."""
        with self._lock:
            if not self._is_current(stream):
                return
            news = self._addressed(self._scheduler.cancel(stream.request_id, reason))
        self._deliver(news)
        self._pipeline.wake()  # what waited for the freed blocks can run now

    def finish(self, stream: RequestStream, index: int, reason: FinishReason) -> None:
        """End one sequence of a request; does nothing when it has ended."""
        with self._lock:
            if not self._is_current(stream):
                return
            news = self._addressed(self._scheduler.finish(stream.request_id, index, reason))
        self._deliver(news)

    def _is_current(self, stream: RequestStream) -> bool:
        """The id still means this stream: a client may reuse it once its request has ended, and
        the end of the first call can be noticed after the second has begun."""
        return self._streams.get(stream.request_id) is stream

    def drain(self) -> None:
        """Take no new requests; running ones go on."""
        self._draining = True

    @property
    def is_draining(self) -> bool:
        """`drain` was called."""
        return self._draining

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    def fail(self, reason: str) -> None:
        """End every request with UNAVAILABLE and refuse new ones, until `resume`."""
        if self._stopping.is_set():
            return
        if not self._failure:
            log.error("the pipeline has failed: %s", reason)
        self._failure = reason
        with self._lock:
            news = self._addressed(self._scheduler.fail_all(reason))
        self._deliver(news)

    # -- the pipeline is lost, and comes back ------------------------------------------------

    def tell_losses(self, listener: Callable[[str, int], None]) -> None:
        """Instead of failing when the pipeline is lost, suspend and call `listener`, who brings it
        back; with the reason and the epoch, from the engine's thread."""
        self._on_lost = listener

    def suspend(self, reason: str) -> None:
        """Send and receive nothing more, for the pipeline is lost. Requests wait; new ones are
        queued. The engine's thread parks at once or after the step that it is sending."""
        with self._lock:
            if self._loss is None and not self._stopping.is_set():
                log.warning("the pipeline is lost: %s", reason)
                self._may_go_on.clear()
                self._loss = Loss(reason=reason, lost_s=time.monotonic())
                for stream in list(self._streams.values()):
                    stream.loss = self._loss
        self._pipeline.wake()

    def wait_parked(self, timeout_s: float) -> bool:
        """Until the engine's thread leaves the pipeline alone, until `resume`; False: it does
        not."""
        return self._parked.wait(timeout_s)

    def resume(self, epoch: int, *, num_blocks: int | None = None) -> Recovery | None:
        """Go on with a pipeline whose caches are empty, after `suspend`; sequences that ran are
        computed anew. None: nothing was lost, or all has stopped.

        Args:
            epoch: that the stages are in.
            num_blocks: KV blocks of the stage that has fewest; default: as many as before.
        """
        with self._lock:
            if self._loss is None or self._stopping.is_set():
                return None
            loss = self._loss
            before = self._scheduler.counts().num_replayed_tokens
            open_streams = list(self._streams.values())
            news = self._addressed(self._scheduler.reset_in_flight(num_blocks))
            recovery = Recovery(
                epoch=epoch,
                reason=loss.reason,
                lost_s=loss.lost_s,
                resumed_s=time.monotonic(),
                num_replayed_tokens=self._scheduler.counts().num_replayed_tokens - before,
            )
            for stream in open_streams:
                stream.recoveries.append(recovery)
                stream.loss = None
            self.model_info = replace(
                self.model_info, max_context_tokens=self._scheduler.config.max_context
            )
            self._pipeline.begin_epoch(epoch)
            self._num_recoveries += 1
            self._failure, self._loss = "", None
            self._parked.clear()
            self._may_go_on.set()
        self._metrics.observe_recovery(recovery)
        self._deliver(news)
        return recovery

    @property
    def health(self) -> str:
        """ "failed", "recovering", "stalled", "draining", "ok" (a step is under way) or "idle"."""
        if self._failure:
            return "failed"
        if self._loss is not None:
            return "recovering"
        if self._pipeline.oldest_age_s > self._stall_s:
            return "stalled"
        if self._draining:
            return "draining"
        return "ok" if self._pipeline.num_in_flight else "idle"

    @property
    def needs_restart(self) -> bool:
        """Nothing moves, or the pipeline is gone and nobody, or for long in vain, brings it
        back."""
        with self._lock:
            loss, failure = self._loss, self._failure
        if not failure:
            return self.health == "stalled"
        return loss is None or time.monotonic() - loss.lost_s > RESTART_AFTER_S

    def status(self) -> DeploymentStatus:
        """A snapshot; asks the stages, so it can take some milliseconds."""
        with self._lock:
            counts = self._scheduler.counts()
            loss, failure, health = self._loss, self._failure, self.health
        return DeploymentStatus(
            model=self.model_info,
            health=health,
            reason=failure or (loss.reason if loss else ""),
            epoch=self._pipeline.epoch,
            num_in_flight=self._pipeline.num_in_flight,
            counts=counts,
            stages=() if failure or loss else self._stages_now(),
            better_plan=self.better_plan,
            num_recoveries=self._num_recoveries,
        )

    def _stages_now(self) -> tuple[StageStatus, ...]:
        """Empty when they cannot be asked: one may be lost, and nobody has noticed yet."""
        try:
            return tuple(self._stage_statuses())
        except UnavailableError as error:
            log.warning("the stages did not say how they are: %s", str(error).partition("\n")[0])
            return ()

    def stop(self) -> None:
        """End the loop and every request; returns when the thread has ended."""
        self._stopping.set()
        self._may_go_on.set()
        with self._lock:
            news = self._addressed(self._scheduler.fail_all("the service has stopped"))
        self._deliver(news)
        if self._thread.ident is not None:
            self._pipeline.wake()
            self._thread.join(timeout=5)
        self._pipeline.close()

    def _deliver(self, news: Sequence[News]) -> None:
        if news and self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._dispatch, news)

    # -- the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._step()
                except UnavailableError as error:
                    if self._on_lost is None:
                        self.fail(str(error))
                        return
                    self.suspend(str(error))
                    self._on_lost(str(error), self._pipeline.epoch)
                if self._loss is not None:
                    self._park()
        except Exception as error:
            log.exception("the engine's loop ended")
            self.fail(f"internal error in the engine: {error!r}")

    def _park(self) -> None:
        """Keep off the pipeline until it is back; only deadlines pass meanwhile."""
        while not self._stopping.is_set():
            with self._lock:
                if self._loss is None:
                    return
                self._parked.set()
                news = self._addressed(self._scheduler.expire(time.monotonic()))
            self._deliver(news)
            self._may_go_on.wait(DEADLINE_POLL_S if self._streams else IDLE_POLL_S)

    def _step(self) -> None:
        """Fill the pipeline, wait for one result, apply it, refill, and only then hand out
        tokens."""
        self._fill()
        completed = self._pipeline.next_result(DEADLINE_POLL_S if self._streams else IDLE_POLL_S)
        now_s = time.monotonic()
        with self._lock:
            events = list(self._scheduler.expire(now_s))
            if completed is not None and not self._failure and self._loss is None:
                if self._num_traced_steps:
                    self._note_step(completed)
                events += self._scheduler.apply(completed.slices, completed.result, now_s)
            news = self._addressed(events)
        if completed is not None:
            self._fill()
            self._count(completed)
        self._deliver(news)

    def _note_step(self, completed: Completed) -> None:
        """Keep a step's times with the requests that were in it; call it under the lock, before
        the step is applied."""
        result = completed.result
        for part in completed.slices:
            request_id = self._scheduler.request_of(part.sequence_id)
            stream = None if request_id is None else self._streams.get(request_id)
            if stream is None or len(stream.steps) == self._num_traced_steps:
                continue
            stream.steps.append(
                StepTiming(
                    step=result.step,
                    epoch=result.epoch,
                    num_tokens=len(part.token_ids),
                    num_batch_tokens=sum(len(p.token_ids) for p in completed.slices),
                    started_unix_s=tuple(result.started_unix_s),
                    forward_s=tuple(result.forward_s),
                )
            )

    def _fill(self) -> None:
        while self._pipeline.has_room and not self._failure and self._loss is None:
            with self._lock:
                slices = self._scheduler.next_micro_batch(time.monotonic())
            if slices is None:
                return
            self._pipeline.submit(slices)

    def _count(self, completed: Completed) -> None:
        self._metrics.observe_step(
            wall_s=completed.wall_s, forward_s=completed.result.forward_s, alone=completed.alone
        )
        with self._lock:
            counts = self._scheduler.counts()
            queue_times = self._scheduler.take_queue_times()
        self._metrics.set_counts(counts)
        for seconds in queue_times:
            self._metrics.observe_queue_time(seconds)

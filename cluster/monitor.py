"""Looks at the deployment now and then: for the gauges of its metrics, and for the live page.

Stages are asked over Ray's control channel, beside their work. While somebody watches the live
page that is once a second, else as often as a scrape would want it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, replace

from tightfit.cluster.deployment_status import DeploymentStatus
from tightfit.cluster.engine import Engine
from tightfit.cluster.metrics import Metrics

log = logging.getLogger(__name__)

IDLE_POLL_S = 5.0
WATCHED_POLL_S = 1.0
WATCHED_FOR_S = 5.0
"""For so long after somebody looked, the deployment counts as watched."""
HISTORY_S = 300.0
MAX_SAMPLES = 400
STOP_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The deployment at one moment."""

    at_s: float
    """On `time.monotonic`."""
    status: DeploymentStatus
    """When stages could not be asked, they are here as they last were."""


class Monitor:
    """A thread that samples an engine's status until closed.

    Args:
        engine: whose; it answers from any thread.
        metrics: whose gauges follow it.
        idle_poll_s: between samples when nobody watches.
        watched_poll_s: between samples when somebody does.
    """

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        *,
        idle_poll_s: float = IDLE_POLL_S,
        watched_poll_s: float = WATCHED_POLL_S,
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._idle_poll_s, self._watched_poll_s = idle_poll_s, watched_poll_s
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._watched_until_s = 0.0
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    def start(self) -> None:
        """Begin to sample."""
        self._thread.start()

    def watch(self) -> tuple[Sample, ...]:
        """The samples of the last minutes, oldest first; for some seconds there will be more of
        them. Empty before the first."""
        with self._wake:
            was_watched = time.monotonic() < self._watched_until_s
            self._watched_until_s = time.monotonic() + WATCHED_FOR_S
            if not was_watched:
                self._wake.notify()
            return tuple(self._samples)

    def close(self) -> None:
        """End the thread; one that waits for a stage ends with the process."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(STOP_LIMIT_S)

    def _run(self) -> None:
        while True:
            started_s = time.monotonic()
            self._sample()
            with self._wake:
                while not self._closing:
                    is_watched = time.monotonic() < self._watched_until_s
                    poll_s = self._watched_poll_s if is_watched else self._idle_poll_s
                    left_s = started_s + poll_s - time.monotonic()
                    if left_s <= 0:
                        break
                    self._wake.wait(left_s)
                if self._closing:
                    return

    def _sample(self) -> None:
        try:
            status = self._engine.status()
        except Exception as error:
            # Its loss is reported to the engine by who watches the stages; this is only a look, and
            # looks again whatever the reason.
            log.warning("the stages did not say how they are: %s", error)
            return
        now_s = time.monotonic()
        if status.stages:
            self._metrics.set_stages(status.stages)
        self._metrics.set_load(status.counts)
        self._metrics.set_health(
            status.health, epoch=status.epoch, num_in_flight=status.num_in_flight
        )
        with self._wake:
            if not status.stages and self._samples:
                status = replace(status, stages=self._samples[-1].status.stages)
            self._samples.append(Sample(at_s=now_s, status=status))
            while self._samples[0].at_s < now_s - HISTORY_S:
                self._samples.popleft()

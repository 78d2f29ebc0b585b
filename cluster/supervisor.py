"""Brings a lost pipeline back: notices, fences, recovers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final

from tightfit.cluster.engine import Engine
from tightfit.cluster.errors import TightfitError, UnavailableError
from tightfit.workers.errors import WorkerError

log = logging.getLogger(__name__)

FIRST_EPOCH: Final = 1
PARK_TIMEOUT_S: Final = 30.0
"""The engine's thread leaves the pipeline after the step that it sends: a full link takes 10 s."""
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 60.0
"""Between attempts, of which each waits twice as long as the one before."""


class Closing(Exception):
    """The service ends while the pipeline is brought back."""


class Supervisor:
    """Stands between the stages, which may be lost, and the engine, which is to go on.

    While the first attempt runs, requests wait. When one fails, all end with the reason and new
    ones are refused; further attempts follow until one succeeds, such as when a device returns.

    Args:
        first_pause_s: after a failed attempt; doubled after each.
    """

    def __init__(self, *, first_pause_s: float = FIRST_PAUSE_S) -> None:
        self._first_pause_s = first_pause_s
        self._changed = threading.Condition()
        self._loss: str | None = None
        """Why the present epoch's pipeline is lost; None: it is not, as far as known."""
        self._epoch = FIRST_EPOCH
        self._closing = False
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None

    def lost(self, reason: str, epoch: int) -> None:
        """A pipeline is lost; news of one that was given up already is none. From any thread, also
        before `start`."""
        with self._changed:
            if epoch < self._epoch or self._loss is not None:
                return
            self._loss = reason
            engine = self._engine
            self._changed.notify_all()
        if engine is not None:
            engine.suspend(reason)

    def start(self, engine: Engine, bring_back: Callable[[int], int]) -> None:
        """Watch over an engine from now on.

        Args:
            engine: that serves, or is about to.
            bring_back: makes the pipeline whole, in the epoch that it is given, and returns the
                number of KV blocks that every stage has. Nobody else uses the pipeline meanwhile.
        """
        with self._changed:
            self._engine = engine
            reason = self._loss
        engine.tell_losses(self.lost)
        if reason is not None:
            engine.suspend(reason)
        self._thread = threading.Thread(
            target=self._run, args=(engine, bring_back), name="supervisor", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raises Closing when the service ends; for long work in `bring_back`."""
        if self._closing:
            raise Closing

    def close(self) -> None:
        """Bring nothing back any more; returns when nothing is under way."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=PARK_TIMEOUT_S)

    def _run(self, engine: Engine, bring_back: Callable[[int], int]) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._loss is not None)
                if self._closing:
                    return
            try:
                self._recover(engine, bring_back)
            except Closing:
                return

    def _recover(self, engine: Engine, bring_back: Callable[[int], int]) -> None:
        """One attempt after the other, until the engine goes on."""
        pause_s, reason = self._first_pause_s, ""
        while True:
            with self._changed:
                reason, self._loss = self._loss or reason, None
                self._epoch += 1
                epoch = self._epoch
            engine.suspend(reason)
            try:
                num_blocks = self._attempt(engine, bring_back, epoch)
                break
            except Closing:
                raise
            except Exception as error:  # whatever it is, a later attempt may succeed
                is_foreseen = isinstance(error, TightfitError | WorkerError)
                log.error(
                    "the pipeline is not back yet, next try in %g s: %s", pause_s, error,
                    exc_info=not is_foreseen,
                )  # fmt: skip
                first_line = (str(error) or repr(error)).partition("\n")[0].rstrip(".")
                engine.fail(f"{reason}. It is not back yet: {first_line}")
            with self._changed:
                self._changed.wait_for(lambda: self._closing, pause_s)
            self.check()
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        recovery = engine.resume(epoch, num_blocks=num_blocks)
        if recovery is not None:
            log.warning(
                "recovered in %.1f s: epoch %d, %d tokens to compute again",
                recovery.resumed_s - recovery.lost_s, epoch, recovery.num_replayed_tokens,
            )  # fmt: skip

    def _attempt(self, engine: Engine, bring_back: Callable[[int], int], epoch: int) -> int:
        if not engine.wait_parked(PARK_TIMEOUT_S):
            raise UnavailableError("the engine does not leave the pipeline: it has ended or hangs")
        return bring_back(epoch)

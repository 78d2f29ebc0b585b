"""Services that plan in one Ray cluster do so one after the other, each until its stages have
loaded: two that measured at the same time would plan for the same memory."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import ray

log = logging.getLogger(__name__)

NAME = "turn-to-plan"
NAMESPACE = "tightfit"
POLL_S = 1.0
ANSWER_TIMEOUT_S = 5.0


class _Turn:
    """Whoever made the actor of this name has the turn. Ray ends it with the process that made it,
    so that no turn is held by a service that is no more."""

    def __init__(self, holder: str) -> None:
        self._holder = holder

    def holder(self) -> str:
        return self._holder


class PlanningTurn:
    """The right to measure a cluster's devices and to take some, from `take` to `release`.

    Args:
        service: what waiting services call the one that has it.
    """

    def __init__(self, service: str) -> None:
        self._holder = f"{service} on {os.uname().nodename} (process {os.getpid()})"
        self._actor: Any = None

    def take(self, check: Callable[[], None]) -> None:
        """Wait for it, for as long as others have it: each is bounded by its own limits of time.
        Nothing where it is ours already.

        Args:
            check: called every second of the wait; may raise to end it.
        """
        waits_for = None
        while self._actor is None and not self._taken():
            holder = _present_holder()
            if holder is not None and holder != waits_for:
                waits_for = holder
                print(f"waiting until {holder} has planned and loaded", file=sys.stderr)
            check()
            time.sleep(POLL_S)

    def _taken(self) -> bool:
        turn = ray.remote(_Turn).options(
            name=NAME, namespace=NAMESPACE, num_cpus=0, max_restarts=0, max_task_retries=0
        )
        try:
            self._actor = turn.remote(self._holder)
        except ray.exceptions.ActorAlreadyExistsError:
            return False
        return True

    def release(self) -> None:
        """Let the next one plan; nothing where it was not taken."""
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


def _present_holder() -> str | None:
    """None: it is being given back, or has not started yet."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        found: str = ray.get(actor.holder.remote(), timeout=ANSWER_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        log.debug("who plans now is not known: %s", error)
        return None
    return found

"""Looks now and then whether a better plan has become possible, and says so. Nothing is moved: a
restart takes the better plan."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable

from tightfit.cluster.errors import TightfitError
from tightfit.cluster.planning.assembly import make_plan
from tightfit.cluster.planning.inventory import Inventory
from tightfit.cluster.planning.plan import Plan
from tightfit.cluster.planning.planner import solve
from tightfit.cluster.planning.pools import Objective
from tightfit.cluster.planning.request import PlanRequest
from tightfit.workers.errors import WorkerError

log = logging.getLogger(__name__)

MORE_TOKENS = 1.25
LESS_TIME = 0.9
"""From how much on a plan for the same price is worth a restart."""


def advantage(
    request: PlanRequest, served: Plan, possible: Plan, *, max_kv_blocks: int
) -> str | None:
    """What a plan has over the one that is served; None: nothing that is worth a restart.

    Args:
        request: what both answer.
        served: as it is.
        possible: on the devices that there are now.
        max_kv_blocks: more are not allocated, wherever there is room.
    """
    if request.objective is Objective.DOLLARS:
        if possible.dollars_per_hour < served.dollars_per_hour:
            now, then = served.dollars_per_hour, possible.dollars_per_hour
            return f"${then:.2f} an hour instead of ${now:.2f}"
        if possible.dollars_per_hour > served.dollars_per_hour:
            return None
    elif len(possible.stages) < len(served.stages):
        return f"{len(possible.stages)} devices instead of {len(served.stages)}"
    elif len(possible.stages) > len(served.stages):
        return None
    blocks = min(possible.kv_blocks, max_kv_blocks)
    if blocks >= MORE_TOKENS * min(served.kv_blocks, max_kv_blocks):
        tokens = blocks * possible.block_size
        return f"KV cache for {tokens:,} tokens instead of {served.kv_tokens:,}"
    if possible.is_measured != served.is_measured:
        return None  # the times of one are by a data sheet, and cannot be compared
    slowest, present = max(possible.step_s(1)), max(served.step_s(1))
    if slowest <= LESS_TIME * present:
        return (
            f"{1000 * slowest:.1f} ms a token on the slowest stage instead of {1000 * present:.1f}"
        )
    return None


def better_plan(
    request: PlanRequest, served: Plan, inventory: Inventory, *, max_kv_blocks: int
) -> str | None:
    """What would be better on these devices than what is served, and where; None: nothing.

    Args:
        request: what is asked for; its own inventory counts for nothing.
        served: the plan, as it is.
        inventory: the devices that there are now, ours as if nothing were on them.
        max_kv_blocks: see `advantage`.

    Raises:
        PlacementError: the request makes no sense for these devices.
    """
    known = {name for d in inventory.devices for name in (d.device_id, d.node, d.type.name)}
    now = dataclasses.replace(request, inventory=inventory, exclude=request.exclude & known)
    solution = solve(now)
    if solution is None:
        return None
    possible = make_plan(served.model, now, solution)
    gain = advantage(request, served, possible, max_kv_blocks=max_kv_blocks)
    if gain is None:
        return None
    return f"{gain}, on {', '.join(stage.device for stage in possible.stages)}"


class PlanWatch:
    """A thread that looks, every so often, from `start` to `close`.

    Args:
        look: says what would be better than what is served.
        interval_s: from one look to the next.
        on_news: told what would be better, in words; None once nothing is any more.
    """

    def __init__(
        self,
        look: Callable[[], str | None],
        interval_s: float,
        on_news: Callable[[str | None], None],
    ) -> None:
        self._look, self._interval_s, self._on_news = look, interval_s, on_news
        self._said: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plan-watch", daemon=True)

    def start(self) -> None:
        """Look for the first time after one interval."""
        self._thread.start()

    def close(self) -> None:
        """Look no more."""
        self._closing.set()
        self._thread.join(timeout=2)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            try:
                news = self._look()
            except (TightfitError, WorkerError) as error:
                log.warning("cannot look for a better plan: %s", error)
                continue
            if news != self._said:
                self._said = news
                self._on_news(news)

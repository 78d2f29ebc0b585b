"""Who the call under way is from, for what the service does on its behalf."""

from __future__ import annotations

import time
from contextvars import ContextVar
from dataclasses import dataclass

from tightfit.cluster.security.limits import Usage
from tightfit.cluster.security.tokens import Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever showed a token."""

    token: Token
    usage: Usage


current_caller: ContextVar[Caller | None] = ContextVar("current_caller", default=None)
"""Set for each call by the gateway; None: callers are not asked for a token."""


def charge(tokens: int) -> None:
    """Count tokens against the limits of the call's token, if it has one."""
    caller = current_caller.get()
    if caller is not None:
        caller.usage.charge(tokens, time.monotonic())

"""What each token may use: calls at once, and tokens per minute. Pure: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.cluster.errors import OverloadedError
from tightfit.cluster.security.tokens import Token

WINDOW_S = 60.0
BUSY_RETRY_S = 1.0


@dataclass(slots=True)
class Budget:
    """A token bucket that is paid afterwards, as only then is the number of tokens known.

    It holds at most a minute's allowance and starts full. A call may begin while anything is left;
    what it takes beyond that is a debt, which the next call waits for. Over time nobody gets more
    than the rate, plus one minute's allowance and what was under way.
    """

    per_minute: int
    level: float
    at_s: float
    """When `level` was right."""

    def _advance(self, now_s: float) -> None:
        gained = (now_s - self.at_s) * self.per_minute / WINDOW_S
        self.level = min(float(self.per_minute), self.level + max(0.0, gained))
        self.at_s = max(self.at_s, now_s)

    def change(self, per_minute: int, now_s: float) -> None:
        """Another rate from now on; debts stay."""
        self._advance(now_s)
        self.per_minute = per_minute
        self.level = min(self.level, float(per_minute))

    def charge(self, tokens: int, now_s: float) -> None:
        """Take tokens out."""
        self._advance(now_s)
        self.level -= tokens

    def wait_s(self, now_s: float) -> float:
        """Seconds until a call may begin; 0: now."""
        self._advance(now_s)
        if self.level >= 1:
            return 0.0
        return (1 - self.level) * WINDOW_S / self.per_minute


class Usage:
    """What one token uses now."""

    def __init__(self, token: Token, now_s: float) -> None:
        self.num_calls = 0
        self._budget: Budget | None = None
        self.follow(token, now_s)

    def follow(self, token: Token, now_s: float) -> None:
        """Take over limits that may have changed."""
        self._token = token
        per_minute = token.max_tokens_per_minute
        if per_minute is None:
            self._budget = None
        elif self._budget is None:
            self._budget = Budget(per_minute=per_minute, level=float(per_minute), at_s=now_s)
        elif self._budget.per_minute != per_minute:
            self._budget.change(per_minute, now_s)

    def begin(self, now_s: float, *, takes_tokens: bool) -> None:
        """Count a call that begins.

        Raises:
            OverloadedError: as many as allowed are under way, or the minute's tokens are used up.
        """
        most = self._token.max_concurrent
        if most is not None and self.num_calls >= most:
            raise OverloadedError(
                f"token {self._token.name!r} has {self.num_calls} calls under way; "
                f"{most} are allowed at once",
                retry_after_s=BUSY_RETRY_S,
            )
        if takes_tokens and self._budget is not None:
            wait_s = self._budget.wait_s(now_s)
            if wait_s > 0:
                raise OverloadedError(
                    f"token {self._token.name!r} has used its {self._budget.per_minute} tokens "
                    f"per minute; more are there in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )
        self.num_calls += 1

    def end(self) -> None:
        """A call that began is over."""
        self.num_calls -= 1

    def charge(self, tokens: int, now_s: float) -> None:
        """Count prompt or generated tokens."""
        if self._budget is not None:
            self._budget.charge(tokens, now_s)

"""Why a call ended before its request."""

from __future__ import annotations

from tightfit.cluster.gateway.status import Context
from tightfit.cluster.request import FinishReason

TRAVEL_S = 0.1
"""How much longer a request may have travelled than the news that it is over."""

ENCODING_SHARE = 0.01
"""How much longer a timeout may become on the wire: gRPC's C core writes 1,001 ms as 1,010 ms and
15.03 s as 15.1 s, so that headers compress well (grpc, `timeout_encoding.cc`)."""


class Leaving:
    """Tells a deadline from a wish to stop. Made when the call begins.

    A client ends a call whose deadline has passed as it ends one that it no longer wants: by
    RST_STREAM with CANCEL. And here the deadline passes later than there, by the request's way and
    by the timeout's rounding. So a call that ends with no more than these left was out of time; but
    one with more than half of its time left was not.

    Args:
        context: of the call.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        whole_s = context.time_remaining()
        self._close_s = min(TRAVEL_S + ENCODING_SHARE * whole_s, whole_s / 2) if whole_s else 0.0

    @property
    def reason(self) -> FinishReason:
        """DEADLINE or CANCELLED, of a call that ends now."""
        left_s = self._context.time_remaining()
        is_late = left_s is not None and left_s <= self._close_s
        return FinishReason.DEADLINE if is_late else FinishReason.CANCELLED

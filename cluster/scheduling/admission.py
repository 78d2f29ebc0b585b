"""Who is let in: what can never run is invalid, what cannot wait now is told when to come back."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.cluster.errors import DeadlineError, InvalidRequestError, OverloadedError
from tightfit.cluster.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What admission is held against."""

    max_context: int
    """Most tokens of one sequence."""
    max_queued_requests: int
    max_queued_tokens: int


def check_admission(
    request: Request,
    limits: Limits,
    *,
    queued_requests: int,
    queued_tokens: int,
    is_known: bool,
    now_s: float,
) -> None:
    """Let a request in or say why not.

    Raises:
        InvalidRequestError: empty, longer than the context, or its id is in use.
        DeadlineError: its deadline has passed.
        OverloadedError: with it a queue would be over its limit. An empty queue takes any valid
        request.
    """
    num_tokens = len(request.prompt_token_ids) + len(request.resume_token_ids)
    if is_known:
        raise InvalidRequestError(
            "request_id", f"{request.request_id!r} is in use by a running request"
        )
    if not request.prompt_token_ids:
        raise InvalidRequestError("prompt", "is empty; give at least one token")
    longest = limits.max_context if request.score_only else limits.max_context - 1
    if num_tokens > longest:
        raise InvalidRequestError(
            "prompt",
            f"has {num_tokens} tokens; the longest that fits the context of {limits.max_context} "
            f"tokens is {longest}",
        )
    if request.deadline_s is not None and request.deadline_s <= now_s:
        raise DeadlineError("the deadline had passed when the request arrived")
    if queued_requests == 0:
        return
    count = request.sampling.n
    if queued_requests + count > limits.max_queued_requests:
        raise OverloadedError(
            f"{queued_requests} sequences are waiting; the limit is {limits.max_queued_requests}"
        )
    if queued_tokens + num_tokens * count > limits.max_queued_tokens:
        raise OverloadedError(
            f"{queued_tokens} prompt tokens are waiting and this request has {num_tokens * count}; "
            f"the limit is {limits.max_queued_tokens}"
        )

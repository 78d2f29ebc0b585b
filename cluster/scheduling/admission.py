"""Who is let in: what can never run is invalid, what cannot wait now is told when to come back."""

from __future__ import annotations

from tightfit.cluster.errors import DeadlineError, InvalidRequestError, OverloadedError
from tightfit.cluster.request import Request
from tightfit.cluster.scheduling.config import SchedulerConfig


def check_request(request: Request, config: SchedulerConfig, now_s: float) -> None:
    """Return if the request can run here, whatever else does.

    Raises:
        InvalidRequestError: empty, longer than the context, or with token ids past the vocabulary.
        DeadlineError: its deadline has passed.
    """
    num_prompt, num_resumed = len(request.prompt_token_ids), len(request.resume_token_ids)
    context = config.max_context
    if not num_prompt:
        raise InvalidRequestError("prompt", "is empty; give at least one token")
    longest = context if request.score_only else context - 1
    if num_prompt > longest:
        raise InvalidRequestError(
            "prompt",
            f"has {num_prompt} tokens; the longest that fits the context of {context} tokens is "
            f"{longest}",
        )
    # A full context is allowed here: such a request only missed the news of its end.
    if num_prompt + num_resumed > context:
        raise InvalidRequestError(
            "resume_token_ids",
            f"has {num_resumed} tokens after a prompt of {num_prompt}; the context holds {context}",
        )
    if num_resumed and (request.sampling.n > 1 or request.score_only):
        raise InvalidRequestError(
            "resume_token_ids", "can only be given to generate, with sampling.n = 1"
        )
    if config.vocab_size is not None:
        _check_token_ids("prompt", request.prompt_token_ids, config.vocab_size)
        _check_token_ids("resume_token_ids", request.resume_token_ids, config.vocab_size)
    if request.deadline_s is not None and request.deadline_s <= now_s:
        raise DeadlineError("the deadline had passed when the request arrived")


def _check_token_ids(field: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(i for i in token_ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            field, f"token id {wrong} is not in the model's vocabulary of {vocab_size}"
        )


def check_room(
    request: Request,
    config: SchedulerConfig,
    *,
    queued_requests: int,
    queued_tokens: int,
    retry_after_s: float,
) -> None:
    """Return if the queue has room for the request. An empty queue takes any.

    Args:
        queued_requests: sequences that wait for their first step.
        queued_tokens: their prompt tokens.
        retry_after_s: hint for a request that is refused.
    Raises:
        OverloadedError: with it a queue would be over its limit.
    """
    if queued_requests == 0:
        return
    count = request.sampling.n
    num_tokens = count * (len(request.prompt_token_ids) + len(request.resume_token_ids))
    if queued_requests + count > config.max_queued_requests:
        raise OverloadedError(
            f"{queued_requests} sequences are waiting; the limit is {config.max_queued_requests}",
            retry_after_s=retry_after_s,
        )
    if queued_tokens + num_tokens > config.max_queued_tokens:
        raise OverloadedError(
            f"{queued_tokens} prompt tokens are waiting and this request has {num_tokens}; the "
            f"limit is {config.max_queued_tokens}",
            retry_after_s=retry_after_s,
        )


class AdmissionRate:
    """How often a sequence leaves the queue, to tell refused clients when to come back."""

    LEAST_S, MOST_S, UNKNOWN_S = 0.1, 60.0, 1.0
    WEIGHT = 0.1
    """Of the newest interval in the running mean."""

    def __init__(self) -> None:
        self._last_s: float | None = None
        self._interval_s: float | None = None

    def note(self, now_s: float) -> None:
        """A sequence has left the queue to run."""
        if self._last_s is not None:
            interval = max(0.0, now_s - self._last_s)
            mean = interval if self._interval_s is None else self._interval_s
            self._interval_s = mean + self.WEIGHT * (interval - mean)
        self._last_s = now_s

    def retry_after_s(self, count: int) -> float:
        """About how long until `count` sequences have left the queue, in seconds."""
        if self._interval_s is None:
            return self.UNKNOWN_S
        return min(self.MOST_S, max(self.LEAST_S, self._interval_s * count))

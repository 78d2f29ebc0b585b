"""What is noted of one request while it runs; at its end its metrics, log line and trace.

While tokens come, nothing is formatted or sent: a few times are kept, and everything is made of
them once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from tightfit.cluster.metrics import Metrics
from tightfit.cluster.request import FinishReason, Request, RequestRecord, StepTiming, TokenEvent
from tightfit.cluster.request_stream import RequestStream
from tightfit.cluster.security.caller import current_caller

log = logging.getLogger("tightfit.request")


MAX_RECOMPUTED = 32
"""Times at which a request was computed anew that are kept."""

Metadata = Iterable[tuple[str, str | bytes]]


class Tracer(Protocol):
    """Where traces go; `tightfit.cluster.tracing.Tracing`."""

    def export(
        self, record: RequestRecord, metadata: Metadata, steps: Sequence[StepTiming] = ()
    ) -> str | None:
        """Make the trace of a request that has ended; its id, if it has one."""


class RequestWatch:
    """One call's times and counts.

    Args:
        metrics: where they are counted.
        tracer: where its trace goes; None: nowhere.
        method: the gRPC method's name.
        metadata: the call's.
    """

    def __init__(
        self, metrics: Metrics, tracer: Tracer | None, method: str, metadata: Metadata
    ) -> None:
        self._metrics, self._tracer, self._method = metrics, tracer, method
        self._metadata = metadata
        self._started_s = self._tokenized_s = time.monotonic()
        self._request: Request | None = None
        self._queued_s: float | None = None
        self._first_token_s: float | None = None
        self._last_token_s: dict[int, float] = {}
        """By sequence."""
        self._num_generated = 0
        self._num_cached = 0
        self._num_restarts: dict[int, int] = {}
        """By sequence, of those that had any."""
        self._recomputed_s: list[float] = []

    def queued(self, request: Request) -> None:
        """Its prompt is tokens, and it is about to be queued."""
        self._request, self._tokenized_s = request, time.monotonic()

    def heard(self, event: TokenEvent) -> None:
        """An event of one of its sequences has arrived."""
        if self._queued_s is None:
            self._queued_s = event.queued_s
        self._num_cached = max(self._num_cached, event.num_cached_tokens)
        if event.token_id is None:
            return
        now_s = time.monotonic()
        if event.num_restarts:
            self._note_restarts(event, now_s)
        self._num_generated += 1
        before_s = self._last_token_s.get(event.index)
        self._last_token_s[event.index] = now_s
        if before_s is not None:
            self._metrics.observe_inter_token(now_s - before_s)
            return
        self._metrics.observe_first_token(now_s - self._started_s)
        if self._first_token_s is None:
            self._first_token_s = now_s

    def _note_restarts(self, event: TokenEvent, now_s: float) -> None:
        if event.num_restarts > self._num_restarts.get(event.index, 0):
            self._num_restarts[event.index] = event.num_restarts
            if len(self._recomputed_s) < MAX_RECOMPUTED:
                self._recomputed_s.append(now_s)

    @property
    def num_generated_tokens(self) -> int:
        """So far, in all sequences."""
        return self._num_generated

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache."""
        return self._num_cached

    def refused(self, status: str) -> None:
        """It was refused with this gRPC status. Why is for its caller alone: the reason may quote
        the prompt."""
        self._metrics.count_refused(status)
        fields = {"method": self._method, "status": status, "client": _client()}
        log.info("refused", extra={name: value for name, value in fields.items() if value})

    def ended(self, reason: FinishReason, events: RequestStream) -> None:
        """It was queued, and has ended.

        Args:
            reason: why.
            events: of it, which know its steps and what befell the pipeline meanwhile.
        """
        request = self._request
        assert request is not None, "only what was queued can end"
        queued_s = self._queued_s
        record = RequestRecord(
            request_id=request.request_id,
            method=self._method,
            finish_reason=reason,
            started_s=self._started_s,
            tokenized_s=self._tokenized_s,
            admitted_s=None if queued_s is None else self._tokenized_s + queued_s,
            first_token_s=self._first_token_s,
            ended_s=time.monotonic(),
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=self._num_cached,
            num_generated_tokens=self._num_generated,
            num_sequences=request.sampling.n,
            recomputed_s=tuple(self._recomputed_s),
            recoveries=tuple(events.recoveries),
            loss=events.loss,
            client=_client(),
        )
        if self._tracer is not None:
            trace_id = self._tracer.export(record, self._metadata, events.steps)
            record = replace(record, trace_id=trace_id)
        self._metrics.count_finished(record)
        if log.isEnabledFor(logging.INFO):
            log.info("finished", extra=log_fields(record))


def _client() -> str | None:
    """Name of the token that this call came with."""
    caller = current_caller.get()
    return None if caller is None else caller.token.name


def log_fields(record: RequestRecord) -> dict[str, object]:
    """A finished request's log line: counts and times, none of its text."""
    fields: dict[str, object] = {
        "request_id": record.request_id,
        "method": record.method,
        "finish_reason": record.finish_reason.value,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "generated_tokens": record.num_generated_tokens,
        "queue_s": _rounded(record.queue_s),
        "ttft_s": _rounded(record.ttft_s),
        "duration_s": _rounded(record.duration_s),
        "recomputed": len(record.recomputed_s) or None,
        "recoveries": len(record.recoveries) or None,
        "client": record.client,
        "trace_id": record.trace_id,
    }
    return {name: value for name, value in fields.items() if value is not None}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)

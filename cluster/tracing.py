"""Traces of requests, by OpenTelemetry, to a collector that speaks OTLP over gRPC.

A request's span is made once, when it has ended, from times that were noted anyway: while tokens
come, tracing costs nothing. It is a child of the span that the caller's `traceparent` names (W3C
Trace Context, in gRPC metadata), and that caller decides whether it is recorded.

The only module that imports OpenTelemetry, which comes with the extra `tracing`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tightfit.cluster.request import FinishReason, Recovery, RequestRecord, StepTiming

SERVICE = "tightfit.v1.InferenceService"
PROPAGATED = ("traceparent", "tracestate")
EXPORT_TIMEOUT_S = 5
"""An export is given up after this; so is the last one, when the service ends."""
FAILURES = (FinishReason.ERROR, FinishReason.DEADLINE)

Metadata = Iterable[tuple[str, str | bytes]]
EventAttributes = dict[str, str | int]


def otlp_exporter(endpoint: str) -> SpanExporter:
    """Sends spans to `http://host:port` or, with TLS, `https://host:port`.

    OpenTelemetry's own variables apply, such as OTEL_EXPORTER_OTLP_HEADERS and _CERTIFICATE.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(
        endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=EXPORT_TIMEOUT_S
    )


class Tracing:
    """Makes and sends spans; from any thread.

    Args:
        exporter: where they go, in batches, from a thread.
        model: name of what is served.
        version: of the service.
        share: of requests that are traced, of those whose caller does not say.
    """

    def __init__(
        self, exporter: SpanExporter, *, model: str, version: str, share: float = 1.0
    ) -> None:
        resource = Resource.create({"service.name": "tightfit", "service.version": version})
        self._provider = TracerProvider(
            resource=resource,
            sampler=ParentBased(TraceIdRatioBased(share)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tightfit", version)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model

    def export(
        self, record: RequestRecord, metadata: Metadata, steps: Sequence[StepTiming] = ()
    ) -> str | None:
        """Make the span of a request that has ended, and one for each stage of each step.

        Args:
            record: the request.
            metadata: its call's.
            steps: those to show.
        Returns:
            its trace's id, in hexadecimal; None: it is not traced.
        """
        clock = _Clock()
        span = self._tracer.start_span(
            f"{SERVICE}/{record.method}",
            context=self._parent(metadata),
            kind=SpanKind.SERVER,
            start_time=clock.unix_ns(record.started_s),
        )
        if not span.is_recording():
            return None
        span.set_attributes(self._attributes(record))
        for name, at_s, of_event in _events(record):
            span.add_event(name, of_event, timestamp=clock.unix_ns(at_s))
        if record.finish_reason in FAILURES:
            span.set_status(Status(StatusCode.ERROR, record.finish_reason.value))
        self._add_steps(span, steps)
        span.end(clock.unix_ns(record.ended_s))
        return format(span.get_span_context().trace_id, "032x")

    def _parent(self, metadata: Metadata) -> Context:
        carrier = {k: v for k, v in metadata if k in PROPAGATED and isinstance(v, str)}
        return self._propagator.extract(carrier, context=Context())

    def _attributes(self, record: RequestRecord) -> dict[str, str | int | float | list[str]]:
        """By OpenTelemetry's conventions for generative AI where they have a name."""
        attributes: dict[str, str | int | float | list[str]] = {
            "rpc.system.name": "grpc",
            "gen_ai.request.model": self._model,
            "gen_ai.usage.input_tokens": record.num_prompt_tokens,
            "gen_ai.usage.output_tokens": record.num_generated_tokens,
            "gen_ai.response.finish_reasons": [record.finish_reason.value],
            "tightfit.request_id": record.request_id,
            "tightfit.cached_tokens": record.num_cached_tokens,
            "tightfit.sequences": record.num_sequences,
        }
        if record.client is not None:
            attributes["tightfit.client"] = record.client
        return attributes

    def _add_steps(self, span: Span, steps: Sequence[StepTiming]) -> None:
        """Times are the stages' own: between hosts they differ by as much as their clocks do."""
        parent = set_span_in_context(span, Context())
        for step in steps:
            for stage, (began_s, took_s) in enumerate(
                zip(step.started_unix_s, step.forward_s, strict=True)
            ):
                child = self._tracer.start_span(
                    f"stage {stage}",
                    context=parent,
                    start_time=round(began_s * 1e9),
                    attributes={
                        "tightfit.stage": stage,
                        "tightfit.epoch": step.epoch,
                        "tightfit.step": step.step,
                        "tightfit.tokens": step.num_tokens,
                        "tightfit.batch_tokens": step.num_batch_tokens,
                    },
                )
                child.end(round((began_s + took_s) * 1e9))

    def close(self) -> None:
        """Send what is left, for EXPORT_TIMEOUT_S at most."""
        self._provider.shutdown()


class _Clock:
    """Turns `time.monotonic` into Unix time."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def unix_ns(self, monotonic_s: float) -> int:
        return self._offset_ns + round(monotonic_s * 1e9)


def _events(record: RequestRecord) -> list[tuple[str, float, EventAttributes]]:
    """What happened to a request, with when, in order."""
    times: list[tuple[str, float | None, EventAttributes]] = [
        ("queue", record.tokenized_s, {}),
        ("prefill", record.admitted_s, {}),
        ("decode", record.first_token_s, {}),
        *(("recomputed", at_s, {}) for at_s in record.recomputed_s),
        *(event for recovery in record.recoveries for event in _recovery_events(recovery)),
    ]
    if record.loss is not None:
        times.append(("lost", record.loss.lost_s, {"tightfit.reason": record.loss.reason}))
    known = [(name, at_s, of_event) for name, at_s, of_event in times if at_s is not None]
    return sorted(known, key=lambda event: event[1])


def _recovery_events(recovery: Recovery) -> list[tuple[str, float, EventAttributes]]:
    """The pipeline's loss, which may be older than the request, and its return."""
    epoch = {"tightfit.next_epoch": recovery.epoch}
    return [
        ("lost", recovery.lost_s, {"tightfit.reason": recovery.reason, **epoch}),
        (
            "recovered",
            recovery.resumed_s,
            {
                "tightfit.epoch": recovery.epoch,
                "tightfit.replayed_tokens": recovery.num_replayed_tokens,
            },
        ),
    ]

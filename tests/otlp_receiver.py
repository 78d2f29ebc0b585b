"""A collector of traces as OpenTelemetry's own is seen by us: OTLP over gRPC, on loopback."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services


class Receiver(services.TraceServiceServicer):
    """Keeps every span that it is sent; `address` is what `--trace-endpoint` takes."""

    def __init__(self) -> None:
        self.spans = []
        self.resources: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        services.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()
        self.address = f"http://127.0.0.1:{port}"

    def Export(self, request, context):
        with self._lock:
            for group in request.resource_spans:
                self.resources.append(
                    {a.key: a.value.string_value for a in group.resource.attributes}
                )
                for scope in group.scope_spans:
                    self.spans += scope.spans
        return messages.ExportTraceServiceResponse()

    def close(self) -> None:
        self._server.stop(grace=None).wait()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

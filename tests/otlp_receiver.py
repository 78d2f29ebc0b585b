"""A collector of traces as OpenTelemetry's own is seen by us: OTLP over gRPC.

`python otlp_receiver.py HOST:PORT` is one that prints a line for each span: its name and trace.
"""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services


class Receiver(services.TraceServiceServicer):
    """Keeps every span that it is sent; `address` is what `--trace-endpoint` takes.

    Args:
        listen: host:port; port 0 takes a free one.
    """

    def __init__(self, listen: str = "127.0.0.1:0") -> None:
        self.spans = []
        self.resources: list[dict[str, str]] = []
        self._lock = threading.Lock()
        self._server = grpc.server(ThreadPoolExecutor(2))
        services.add_TraceServiceServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(listen)
        self._server.start()
        self.address = f"http://{listen.rpartition(':')[0]}:{port}"

    def Export(self, request, context):
        with self._lock:
            for group in request.resource_spans:
                self.resources.append(
                    {a.key: a.value.string_value for a in group.resource.attributes}
                )
                for scope in group.scope_spans:
                    self.spans += scope.spans
        return messages.ExportTraceServiceResponse()

    def wait(self) -> None:
        self._server.wait_for_termination()

    def close(self) -> None:
        self._server.stop(grace=None).wait()

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PrintingReceiver(Receiver):
    def Export(self, request, context):
        for group in request.resource_spans:
            for span in (span for scope in group.scope_spans for span in scope.spans):
                print(span.name, span.trace_id.hex(), flush=True)
        return messages.ExportTraceServiceResponse()


if __name__ == "__main__":
    with PrintingReceiver(sys.argv[1]) as receiver:
        receiver.wait()

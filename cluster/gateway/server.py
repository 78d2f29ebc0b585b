"""The gRPC server: services, health, reflection."""

from __future__ import annotations

import asyncio

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tightfit.cluster.engine import Engine
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway.auth import Audit, Authenticate, GatewaySecurity
from tightfit.cluster.gateway.cluster_service import ClusterService
from tightfit.cluster.gateway.service import InferenceService
from tightfit.cluster.gateway.status import RefuseMalformed
from tightfit.cluster.gateway.watch import Tracer
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.v1 import cluster_pb2, inference_pb2
from tightfit.v1.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from tightfit.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server

INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
CLUSTER = cluster_pb2.DESCRIPTOR.services_by_name["ClusterService"].full_name
LIVENESS = "liveness"
"""A name that health checks may ask for: whether this process is of use, or has to be started
again."""
HEALTH_POLL_S = 0.25
STOP_GRACE_S = 1.0
MAX_REQUEST_BYTES = 4 * 2**20

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 3),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for TLS, and for HTTP/2's first frames
    ("grpc.so_reuseport", 0),  # a second service on the port is an error, not a coin toss
)
HEALTH_OPTIONS = (("grpc.max_receive_message_length", 4096), *OPTIONS[1:])
MAX_PROBES = 64
"""Health checks and watches at once on the port for them."""


def _listen(
    server: grpc.aio.Server, host: str, port: int, credentials: grpc.ServerCredentials | None
) -> int:
    """The port that is listened on.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    try:
        if credentials is None:
            return server.add_insecure_port(f"{host}:{port}")
        return server.add_secure_port(f"{host}:{port}", credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}. Is another service using the port?"
        ) from error


class GatewayServer:
    """Serves one engine over gRPC. All methods run in one event loop.

    Args:
        engine: started by `start`, stopped by the caller.
        tokenizer: the model's.
        metrics: where to count.
        security: what callers have to show; default: nothing.
        tracer: where traces of requests go; None: nowhere.
    Raises:
        ConfigError: the checkpoint's chat template is not valid.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        security: GatewaySecurity | None = None,
        *,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine, self._metrics = engine, metrics
        self._security = security or GatewaySecurity()
        self._server = grpc.aio.server(options=OPTIONS, interceptors=self._interceptors())
        self._health_server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._watcher: asyncio.Task[None] | None = None
        self.drain_requested = asyncio.Event()
        self._inference = InferenceService(engine, tokenizer, metrics, tracer)
        add_InferenceServiceServicer_to_server(self._inference, self._server)
        add_ClusterServiceServicer_to_server(ClusterService(engine, self._drain), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (INFERENCE, CLUSTER, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
        )

    def _interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """From the outermost in."""
        found: list[grpc.aio.ServerInterceptor] = []
        if self._security.audit is not None:
            found.append(Audit(self._security.audit))
        if self._security.tokens is not None:
            found.append(Authenticate(self._security.tokens, self._metrics))
        return [*found, RefuseMalformed()]

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> int:
        """Listen and serve; returns the port, which was chosen if 0 was asked for.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        bound = _listen(self._server, host, port, self._security.credentials)
        self._engine.start()
        await self._server.start()
        await self._set_health()
        self._watcher = asyncio.create_task(self._watch_health())
        return bound

    async def start_health(self, host: str, port: int) -> int:
        """Answer health checks, and nothing else, on another port as well, without TLS or token;
        returns the port.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        server = grpc.aio.server(options=HEALTH_OPTIONS, maximum_concurrent_rpcs=MAX_PROBES)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        bound = _listen(server, host, port, None)
        await server.start()
        self._health_server = server
        return bound

    def _drain(self) -> None:
        self._engine.drain()
        self.drain_requested.set()

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, wait for running ones; whether all ended within `grace_s`."""
        self._drain()
        await self._set_health()
        deadline = asyncio.get_running_loop().time() + grace_s
        while self._engine.num_unfinished and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)
        return self._engine.num_unfinished == 0

    async def stop(self) -> None:
        """Stop listening; calls still running are cancelled after a short grace."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace=STOP_GRACE_S)
        if self._health_server is not None:
            await self._health_server.stop(grace=None)
        self._inference.close()

    async def _watch_health(self) -> None:
        """Tell probes the truth: serving means progress, not just a living process."""
        while True:
            await asyncio.sleep(HEALTH_POLL_S)
            await self._set_health()

    async def _set_health(self) -> None:
        serving = self._engine.health in ("ok", "idle")
        status = health_pb2.HealthCheckResponse.ServingStatus
        state = status.SERVING if serving else status.NOT_SERVING
        for service in ("", INFERENCE):
            await self._health.set(service, state)
        live = status.NOT_SERVING if self._engine.needs_restart else status.SERVING
        await self._health.set(LIVENESS, live)
        # The cluster's state can be asked even when nothing is served.
        await self._health.set(CLUSTER, status.SERVING)

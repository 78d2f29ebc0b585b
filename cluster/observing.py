"""What a service shows of itself, started as its settings say: metrics, traces, the live page."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from prometheus_client import CollectorRegistry

from tightfit import __version__
from tightfit.cluster.config import ServeConfig, split_address
from tightfit.cluster.engine import Engine
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.gateway.watch import Tracer
from tightfit.cluster.live_page.server import LiveServer
from tightfit.cluster.metrics import Metrics, MetricsServer
from tightfit.cluster.monitor import Monitor
from tightfit.cluster.security.browser_tls import BrowserTls
from tightfit.cluster.security.store import TokenStore


def start_tracing(config: ServeConfig, cleanup: ExitStack) -> Tracer | None:
    """Where traces go; None: nowhere. `cleanup` sends what is left.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """
    if config.trace_endpoint is None:
        return None
    try:
        from tightfit.cluster.tracing import Tracing, otlp_exporter
    except ImportError as error:
        raise ConfigError(
            f"trace_endpoint: {error}. Install it with: pip install 'tightfit-serve[tracing]'"
        ) from error
    tracing = Tracing(
        otlp_exporter(config.trace_endpoint),
        model=config.model_name,
        version=__version__,
        share=config.trace_share,
    )
    cleanup.callback(tracing.close)
    return tracing


def show(
    config: ServeConfig,
    engine: Engine,
    metrics: Metrics,
    registry: CollectorRegistry,
    cleanup: ExitStack,
) -> None:
    """Have the metrics follow the engine, and open the ports that the settings name; `cleanup`
    closes them.

    Raises:
        ConfigError, OSError: an address cannot be listened on.
    """
    model = engine.model_info
    metrics.set_model(
        version=__version__,
        model=model.name,
        family=model.family,
        weight_format=model.weight_format,
    )
    monitor = Monitor(engine, metrics)
    cleanup.callback(monitor.close)
    monitor.start()
    if config.metrics_listen is not None:
        host, port = split_address(config.metrics_listen)
        cleanup.callback(MetricsServer(registry, host, port).close)
    if config.live_listen is not None:
        cleanup.callback(_live_server(config, config.live_listen, monitor).close)


def _live_server(config: ServeConfig, listen: str, monitor: Monitor) -> LiveServer:
    """The live page: behind the tokens, and under the certificate, of the gRPC port."""
    tls = None
    if config.tls_cert is not None and config.tls_key is not None:
        client_ca = None if config.tls_client_ca is None else Path(config.tls_client_ca)
        tls = BrowserTls(Path(config.tls_cert), Path(config.tls_key), client_ca).context
    is_allowed = None
    if config.tokens_file is not None:
        store = TokenStore(Path(config.tokens_file))  # its own: a store serves one thread at a time

        def is_allowed(secret: str) -> bool:
            token = store.find(secret)
            return token is not None and not store.has_expired(token)

    return LiveServer(monitor, *split_address(listen), is_allowed=is_allowed, tls=tls)

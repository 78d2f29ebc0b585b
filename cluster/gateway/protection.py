"""From the settings to what the gateway asks of callers."""

from __future__ import annotations

import logging
from pathlib import Path

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.gateway.auth import GatewaySecurity
from tightfit.cluster.security.audit import STANDARD_ERROR, AuditLog
from tightfit.cluster.security.store import TokenStore
from tightfit.cluster.security.tls import ServerTls

log = logging.getLogger(__name__)


def gateway_security(config: ServeConfig) -> GatewaySecurity:
    """What the gateway asks of callers.

    Raises:
        ConfigError: a file of it cannot be used.
    """
    client_ca = Path(config.tls_client_ca) if config.tls_client_ca is not None else None
    credentials = None
    if config.tls_cert is not None and config.tls_key is not None:
        credentials = ServerTls(
            Path(config.tls_cert), Path(config.tls_key), client_ca
        ).credentials()
    tokens = TokenStore(Path(config.tokens_file)) if config.tokens_file is not None else None
    target = config.audit_log or (STANDARD_ERROR if config.has_authentication else None)
    audit = AuditLog(target) if target is not None else None
    if config.insecure_listen and (credentials is None or not config.has_authentication):
        log.warning(
            "insecure_listen: %s asks for %s and %s",
            config.listen,
            "no encryption" if credentials is None else "encryption",
            "no authentication" if not config.has_authentication else "authentication",
        )
    return GatewaySecurity(credentials=credentials, tokens=tokens, audit=audit)

"""The gateway's certificates for a port that browsers open: read again when they change."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.security.files import signature

log = logging.getLogger(__name__)


class BrowserTls:
    """TLS 1.2 or later for an HTTPS server, from the files that the gRPC port uses.

    Args:
        cert: PEM, the gateway's certificate and the chain up to its authority.
        key: PEM, its private key, not encrypted.
        client_ca: PEM, authorities of client certificates; given, a browser without one of theirs
            is refused in the handshake.
    Raises:
        ConfigError: they cannot be used. Once serving, the certificates read last stay in use
            instead, and the log says so.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._paths = [path for path in (cert, key, client_ca) if path is not None]
        self._lock = threading.Lock()
        self._signature = signature(self._paths)
        self._context = self._read()

    def _read(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self._cert, self._key, password="")
            if self._client_ca is not None:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(self._client_ca)
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(f"{self._cert}: cannot be used for HTTPS: {error}") from error
        return context

    def context(self) -> ssl.SSLContext:
        """For a new connection; from any thread."""
        found = signature(self._paths)
        with self._lock:
            if found != self._signature:
                self._signature = found
                try:
                    self._context = self._read()
                except ConfigError as error:
                    log.error("the certificates read last stay in use: %s", error)
            return self._context

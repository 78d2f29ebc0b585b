"""The gateway's certificates: checked when they are read, and read again when they change."""

from __future__ import annotations

import logging
import ssl
import threading
from pathlib import Path

import grpc

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.security.files import signature, warn_if_exposed

log = logging.getLogger(__name__)


class ServerTls:
    """TLS 1.2 or later for a gRPC server. Every handshake uses the files as they are then.

    Args:
        cert: PEM, the gateway's certificate and the chain up to its authority.
        key: PEM, its private key.
        client_ca: PEM, authorities of client certificates; given, a client without one of theirs
            is refused in the handshake.
    Raises:
        ConfigError: a file cannot be read, or key and certificate do not belong together. Once
            serving, the certificates read last stay in use instead, and the log says so.
    """

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        self._cert, self._key, self._client_ca = cert, key, client_ca
        self._paths = [path for path in (cert, key, client_ca) if path is not None]
        self._lock = threading.Lock()
        self._signature = signature(self._paths)
        self._configuration = self._read()
        warn_if_exposed(key, secret=True)

    def credentials(self) -> grpc.ServerCredentials:
        """For `add_secure_port`."""
        return grpc.dynamic_ssl_server_credentials(
            self._configuration,
            self._changed,  # type: ignore[arg-type]  # may return None, as gRPC documents
            require_client_authentication=self._client_ca is not None,
        )

    def _read(self) -> grpc.ServerCertificateConfiguration:
        self._check()
        roots = self._client_ca.read_bytes() if self._client_ca is not None else None
        return grpc.ssl_server_certificate_configuration(
            [(self._key.read_bytes(), self._cert.read_bytes())], root_certificates=roots
        )

    def _check(self) -> None:
        """gRPC itself would say only that a port cannot be bound."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        for path in self._paths:
            try:
                path.read_bytes()
            except OSError as error:
                raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            context.load_cert_chain(self._cert, self._key, password=_no_password)
        except ssl.SSLError as error:
            raise ConfigError(
                f"{self._cert} and {self._key} are no certificate and its key, in PEM: "
                f"{error.reason or error}"
            ) from error
        if self._client_ca is not None:
            try:
                context.load_verify_locations(self._client_ca)
            except ssl.SSLError as error:
                raise ConfigError(
                    f"{self._client_ca} holds no certificates in PEM: {error.reason or error}"
                ) from error

    def _changed(self) -> grpc.ServerCertificateConfiguration | None:
        """For gRPC, before each handshake, on a thread of its: None: nothing has changed."""
        found = signature(self._paths)
        with self._lock:
            if found == self._signature:
                return None
            self._signature = found
            try:
                self._configuration = self._read()
            except (ConfigError, OSError) as error:
                log.error("the certificates read last stay in use: %s", error)
                return None
        log.warning("%s: read again", self._cert)
        return self._configuration


def _no_password() -> str:
    raise ConfigError("the private key is encrypted; give one that is not, in a file of mode 0600")

"""Certificates for tests: authorities, servers, clients, some that must not be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme

LONG_AGO = datetime.now(UTC) - timedelta(days=1)


class Certificates:
    """Files of one authority in a directory of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._authority = trustme.CA()
        self.ca = directory / "ca.crt"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(
        self, name: str, *, expired: bool = False, hosts: Sequence[str] = ("127.0.0.1", "localhost")
    ) -> tuple[Path, Path]:
        """Files of a certificate chain of these hosts, and of its key; `name`: its common name."""
        leaf = self._authority.issue_cert(
            *hosts, common_name=name, not_after=LONG_AGO if expired else None
        )
        cert, key = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
        key.touch(mode=0o600)
        key.write_bytes(leaf.private_key_pem.bytes())
        return cert, key

    def trusting(
        self, cert: Path | None = None, key: Path | None = None
    ) -> grpc.ChannelCredentials:
        """Credentials of a client that trusts this authority, and may have a certificate."""
        return grpc.ssl_channel_credentials(
            self.ca.read_bytes(),
            private_key=key.read_bytes() if key else None,
            certificate_chain=cert.read_bytes() if cert else None,
        )

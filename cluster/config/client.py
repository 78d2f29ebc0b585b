"""Settings of the commands that talk to a service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.config.addresses import DEFAULT_LISTEN, split_address
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.settings import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientConfig:
    """How the client commands reach a service."""

    target: Annotated[
        str,
        Option(
            "host:port of the service; default: serve.listen of the same file.",
            check=split_address,
        ),
    ] = DEFAULT_LISTEN
    timeout_s: Annotated[float, Option("Seconds until a request is given up.", at_least=0.001)] = (
        600.0
    )
    tls: Annotated[
        bool, Option("Encrypt, and trust the public certificate authorities; implied by tls_ca.")
    ] = False
    tls_ca: Annotated[
        str | None,
        Option("PEM file of the authorities that the service's certificate may come from."),
    ] = None
    tls_cert: Annotated[
        str | None, Option("PEM file of this client's certificate chain, where the service asks.")
    ] = None
    tls_key: Annotated[str | None, Option("PEM file of that certificate's private key.")] = None
    token_file: Annotated[
        str | None,
        Option("File that holds the bearer token; default: the variable TIGHTFIT_TOKEN."),
    ] = None
    insecure_token: Annotated[
        bool, Option("Send the token to another host even without encryption: who listens has it.")
    ] = False

    def __post_init__(self) -> None:
        """Raises ConfigError where settings do not go together."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("client.tls_cert and client.tls_key go together: give both")

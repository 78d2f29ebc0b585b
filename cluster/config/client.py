"""Settings of the commands that talk to a service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.config.addresses import DEFAULT_LISTEN, split_address
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

"""Settings of `tightfit token`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from tightfit.cluster.settings import Option


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenConfig:
    """Which file of tokens, and what a new token may do."""

    tokens_file: Annotated[
        str | None,
        Option("File of tokens; default: serve.tokens_file of the same configuration file."),
    ] = None
    role: Annotated[
        str,
        Option(
            "Of a new token; admin: may also drain the service.",
            choices=("user", "admin"),
        ),
    ] = "user"
    days: Annotated[
        float | None,
        Option("Days until a new token expires; default: never.", at_least=0, at_most=36500),
    ] = None
    max_concurrent: Annotated[
        int | None,
        Option("Calls of a new token at once; default: any number.", at_least=1, at_most=2**31),
    ] = None
    max_tokens_per_minute: Annotated[
        int | None,
        Option(
            "Prompt and generated tokens of a new token's calls, on average; default: any number.",
            at_least=1,
            at_most=2**53,
        ),
    ] = None

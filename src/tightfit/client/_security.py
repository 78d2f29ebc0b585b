"""How a client shows who it is, and knows whom it talks to."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import grpc

from tightfit.client import _convert

TOKEN_VARIABLE = "TIGHTFIT_TOKEN"
MAX_TOKEN_FILE_BYTES = 4096


Metadata = Sequence[tuple[str, str]]
"""Of a call: names and values."""


class ConnectOptions(TypedDict, total=False):
    """Keyword arguments of a client besides its target and deadline."""

    credentials: grpc.ChannelCredentials | None
    token: str | None
    insecure_token: bool
    metadata: Metadata


def tls_credentials(
    *, ca: Path | None = None, cert: Path | None = None, key: Path | None = None
) -> grpc.ChannelCredentials:
    """Credentials for TLS from PEM files.

    Args:
        ca: authorities that the service's certificate may come from; None: the public ones.
        cert: this client's certificate chain, where the service asks for one; with its `key`.
    Raises:
        OSError: a file cannot be read.
    """
    return grpc.ssl_channel_credentials(
        root_certificates=ca.read_bytes() if ca is not None else None,
        private_key=key.read_bytes() if key is not None else None,
        certificate_chain=cert.read_bytes() if cert is not None else None,
    )


def read_token(file: Path | None = None) -> str | None:
    """The bearer token in a file, else in the variable TIGHTFIT_TOKEN; None: there is none.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no token. What it holds is not repeated.
    """
    if file is None:
        text = os.environ.get(TOKEN_VARIABLE, "")
        where = f"the variable {TOKEN_VARIABLE}"
        if not text:
            return None
    else:
        with file.open("rb") as content:
            text = content.read(MAX_TOKEN_FILE_BYTES).decode("ascii", "replace")
        where = str(file)
    token = text.strip()
    if not re.fullmatch(r"[!-~]{1,1024}", token):
        raise ValueError(f"{where} does not hold one token, and nothing else")
    return token


def connect_options(
    target: str,
    *,
    tls: bool,
    ca: str | None,
    cert: str | None,
    key: str | None,
    token_file: str | None,
    insecure_token: bool,
) -> ConnectOptions:
    """Keyword arguments of a client from what a command line names.

    Raises:
        ValueError: a file cannot be read or holds something else, one of a pair is missing, or the
            token would travel to another machine where others can read it.
    """
    if (cert is None) != (key is None):
        raise ValueError("a client's certificate and its key go together: give both")
    paths = [Path(name) if name is not None else None for name in (ca, cert, key, token_file)]
    try:
        token = read_token(paths[3])
        credentials = None
        if tls or ca is not None or cert is not None:
            credentials = tls_credentials(ca=paths[0], cert=paths[1], key=paths[2])
    except OSError as error:
        raise ValueError(f"{error.filename}: cannot be read: {error.strerror}") from error
    is_encrypted = credentials is not None
    call_metadata(target, token, is_encrypted=is_encrypted, insecure_token=insecure_token)
    return ConnectOptions(credentials=credentials, token=token, insecure_token=insecure_token)


def call_metadata(
    target: str, token: str | None, *, is_encrypted: bool, insecure_token: bool
) -> tuple[tuple[str, str], ...]:
    """What goes with every call.

    Raises:
        ValueError: the token would travel to another machine where others can read it.
    """
    if token is None:
        return ()
    if not (is_encrypted or insecure_token or stays_here(target)):
        raise ValueError(
            f"the token would travel to {target} without encryption, for everybody on the way to "
            "read: use TLS, or say insecure_token"
        )
    return (("authorization", f"Bearer {token}"),)


def channel_options(target: str) -> tuple[tuple[str, int], ...]:
    """gRPC's options for a target. What is for this machine goes to no proxy: it may be in the
    clear."""
    if stays_here(target):
        return (*_convert.OPTIONS, ("grpc.enable_http_proxy", 0))
    return _convert.OPTIONS


def stays_here(target: str) -> bool:
    """Whether what is sent to a gRPC target does not leave this machine."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = re.sub(r"^(dns:(//[^/]*/)?|ipv4:|ipv6:)", "", target)
    host = re.sub(r":[0-9]+$", "", host) if host.count(":") == 1 or "]" in host else host
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

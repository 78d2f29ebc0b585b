"""host:port, as settings give it."""

from __future__ import annotations

import ipaddress
import re

DEFAULT_LISTEN = "127.0.0.1:50051"


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[::1]:port".

    Raises:
        ValueError: no port, or one that is none.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError(f"{text!r} is not host:port, such as {DEFAULT_LISTEN}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(f"{text!r}: write an IPv6 host in brackets, such as [::1]:50051")
    return host, int(port)


def check_collector(text: str) -> None:
    """Check that a collector of traces can be at this address.

    Raises:
        ValueError: it is not http://host:port or https://host:port.
    """
    scheme, separator, address = text.partition("://")
    if not separator or scheme not in ("http", "https"):
        raise ValueError(f"{text!r} is not http://host:port or https://host:port")
    split_address(address)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host` (as `split_address` gives it)."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

"""What scanners and broken clients send to a port."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable

SILENCE_S = 0.05


def noise() -> list[bytes]:
    """HTTP, the beginnings of TLS and of HTTP/2 followed by nonsense, and nonsense alone."""
    rng = random.Random(7)
    return [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + rng.randbytes(500),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(500),
        rng.randbytes(5000),
    ]


def send_noise(ports: Iterable[int], host: str = "127.0.0.1") -> int:
    """Send all of it to each port; how many connections were taken."""
    taken = 0
    for port in ports:
        for data in noise():
            try:
                with socket.create_connection((host, port), timeout=5) as connection:
                    taken += 1
                    connection.sendall(data)
                    connection.settimeout(SILENCE_S)
                    connection.recv(1000)
            except OSError:
                continue  # it hung up, or has nothing to say
    return taken

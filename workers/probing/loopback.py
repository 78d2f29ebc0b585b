"""The link between two stages, of one host or of two: what hidden states cross, there and back."""

from __future__ import annotations

import tempfile
import threading
import time
from statistics import median
from typing import Final

from tightfit.workers.api import MicroBatch
from tightfit.workers.errors import LinkError
from tightfit.workers.link import Endpoint, Receiver, Sender, StepMessage
from tightfit.workers.link_keys import LinkKeys
from tightfit.workers.probing.result import SMALL_BYTES, LinkRate

LARGE_BYTES: Final = 4 * 2**20
"""A micro-batch of some 150 such tokens."""
MAX_ROUNDS: Final = 101
SIZE_LIMIT_S: Final = 0.2
TIMEOUT_S: Final = 5.0


class LinkEnd:
    """One end of a link that is measured, in a process of its own or on a thread.

    Args:
        name: of this end, unlike the other's.
        node_id: see `link.Endpoint`.
        tcp_host: address to listen on; None: only the host's own ends reach this one.
    """

    def __init__(self, name: str, node_id: str, tcp_host: str | None = None) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="tightfit-")
        self._node_id = node_id
        self._keys = LinkKeys.new()
        self._receiver = Receiver(
            StepMessage,
            run_dir=self._directory.name,
            name=name,
            node_id=node_id,
            tcp_host=tcp_host,
            keys=self._keys,
        )

    def endpoint(self) -> Endpoint:
        """Where this end listens."""
        return self._receiver.endpoint

    def echo(self, other: Endpoint) -> None:
        """Send everything back until an empty message comes, or none for 5 s."""
        sender = self._sender_to(other)
        try:
            while (received := self._receiver.receive(TIMEOUT_S)) is not None and received[1]:
                sender.send(*received)
        finally:
            sender.close()
            self.close()

    def measure(self, other: Endpoint, source: str, target: str) -> LinkRate:
        """Times of messages of both sizes to an end that echoes them, half of a round trip.

        Raises:
            LinkError: a message has not come back for 5 s.
        """
        sender = self._sender_to(other)
        try:
            small_s = self._one_way_s(sender, SMALL_BYTES)
            large_s = self._one_way_s(sender, LARGE_BYTES)
        finally:
            sender.send(_message())  # empty: the echo ends
            sender.close(linger_s=1)
            self.close()
        return LinkRate(
            source=source, target=target, bytes_per_s=LARGE_BYTES / large_s, latency_s=small_s
        )

    def _sender_to(self, other: Endpoint) -> Sender:
        """To the other end, which alone is heard from now on."""
        self._receiver.admit(other.public_key)
        return Sender(other, node_id=self._node_id, keys=self._keys)

    def _one_way_s(self, sender: Sender, num_bytes: int) -> float:
        payload, message = bytes(num_bytes), _message()
        times: list[float] = []
        end_s = time.monotonic() + SIZE_LIMIT_S
        while len(times) < 2 or (len(times) < MAX_ROUNDS and time.monotonic() < end_s):
            start_s = time.perf_counter()
            sender.send(message, payload)
            if self._receiver.receive(TIMEOUT_S) is None:
                raise LinkError(f"{num_bytes:,} bytes have not come back in {TIMEOUT_S:g} s")
            times.append(time.perf_counter() - start_s)
        return median(times[1:]) / 2  # the first connects

    def close(self) -> None:
        """Listen no more."""
        self._receiver.close()
        self._directory.cleanup()


def measure_loopback() -> LinkRate:
    """The link from one process to another over `workers.link`'s Unix sockets.

    Raises:
        LinkError: see `LinkEnd.measure`.
    """
    here, there = LinkEnd("here", "host"), LinkEnd("there", "host")
    echo = threading.Thread(target=there.echo, args=(here.endpoint(),), daemon=True)
    echo.start()
    try:
        return here.measure(there.endpoint(), "cpu", "cpu")
    finally:
        echo.join(2 * TIMEOUT_S)


def _message() -> StepMessage:
    return StepMessage(batch=MicroBatch(epoch=0, step=0, slices=[]))

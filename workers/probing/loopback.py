"""The link between two stages of one host: what hidden states cross, there and back."""

from __future__ import annotations

import tempfile
import threading
import time
from statistics import median
from typing import Final

from tightfit.workers.api import MicroBatch
from tightfit.workers.errors import LinkError
from tightfit.workers.link import Receiver, Sender, StepMessage
from tightfit.workers.probing.result import SMALL_BYTES, LinkRate

LARGE_BYTES: Final = 4 * 2**20
"""A micro-batch of some 150 such tokens."""
MAX_ROUNDS: Final = 101
SIZE_LIMIT_S: Final = 0.2
TIMEOUT_S: Final = 5.0


def measure_loopback() -> LinkRate:
    """Times of messages of both sizes over `workers.link`'s Unix sockets, half of a round trip.

    Raises:
        LinkError: a message has not come back for 5 s.
    """
    with tempfile.TemporaryDirectory(prefix="tightfit-") as directory:
        there = Receiver(StepMessage, run_dir=directory, name="there", node_id="here")
        back = Receiver(StepMessage, run_dir=directory, name="back", node_id="here")
        sender = Sender(there.endpoint, node_id="here")
        echo = threading.Thread(target=_echo, args=(there, back), daemon=True)
        echo.start()
        try:
            small_s = _one_way_s(sender, back, SMALL_BYTES)
            large_s = _one_way_s(sender, back, LARGE_BYTES)
        finally:
            sender.send(_message())  # empty: the echo ends
            echo.join(2 * TIMEOUT_S)
            sender.close()
            back.close()
    return LinkRate(
        source="cpu", target="cpu", bytes_per_s=LARGE_BYTES / large_s, latency_s=small_s
    )


def _message() -> StepMessage:
    return StepMessage(batch=MicroBatch(epoch=0, step=0, slices=[]))


def _echo(receiver: Receiver[StepMessage], back: Receiver[StepMessage]) -> None:
    """Send everything back until an empty message comes, or none for 5 s."""
    sender = Sender(back.endpoint, node_id="here")
    try:
        while (received := receiver.receive(TIMEOUT_S)) is not None and len(received[1]):
            sender.send(*received)
    finally:
        sender.close()
        receiver.close()


def _one_way_s(sender: Sender, back: Receiver[StepMessage], num_bytes: int) -> float:
    payload, message = bytes(num_bytes), _message()
    times: list[float] = []
    end_s = time.monotonic() + SIZE_LIMIT_S
    while len(times) < 2 or (len(times) < MAX_ROUNDS and time.monotonic() < end_s):
        start_s = time.perf_counter()
        sender.send(message, payload)
        if back.receive(TIMEOUT_S) is None:
            raise LinkError(f"{num_bytes:,} bytes have not come back from this host in 5 s")
        times.append(time.perf_counter() - start_s)
    return median(times[1:]) / 2  # the first connects

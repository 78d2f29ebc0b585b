"""Links: one-way ZeroMQ channels between neighbouring stages. No torch, no pickle.

A message is two frames: a msgpack header, and the hidden states as raw bytes (empty on the way to
the first stage). Neighbours on one host talk over a Unix socket in a directory that only its owner
can enter; across hosts over TCP, encrypted with CURVE, where a receiver takes only the one sender
whose key it was told (`link_keys`).
"""

from __future__ import annotations

import os
import stat
import time
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

import msgspec
import zmq

from tightfit.workers.api import MicroBatch, StepResult
from tightfit.workers.errors import LinkError
from tightfit.workers.link_keys import MAX_FRAME_BYTES, Gatekeeper, LinkKeys

M = TypeVar("M")

COPIED_BYTES: Final = 65536
"""Payloads below this are copied into the socket; larger ones are sent from where they lie."""

DTYPE_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a receiver listens."""

    node_id: str
    """Host identity: senders with the same one use the Unix socket."""
    ipc: str
    """`ipc://…` address."""
    tcp: str | None
    """`tcp://host:port` address; None when only neighbours on the same host may connect."""
    public_key: str
    """CURVE key (Z85) of the process that listens, which also proves who it is when it sends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMessage:
    """Header of one micro-batch on its way through the stages."""

    batch: MicroBatch
    hidden_size: int = 0
    """Width of the rows that follow; 0 on the way to the first stage."""
    dtype: str = "fp32"
    """Type of the rows that follow."""
    forward_s: list[float] = field(default_factory=list)
    """Seconds that the stages passed so far spent computing."""
    started_unix_s: list[float] = field(default_factory=list)
    """When each of them began to, by its own host's clock."""

    @property
    def payload_bytes(self) -> int:
        """Size of the second frame."""
        return self.batch.num_tokens * self.hidden_size * DTYPE_BYTES[self.dtype]


def _make_private(directory: str) -> None:
    """Make a directory that only we can enter.

    Raises:
        LinkError: there is one that others made, or that others can enter.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    found = os.lstat(directory)
    if (
        not stat.S_ISDIR(found.st_mode)
        or found.st_uid != os.geteuid()
        or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    ):
        raise LinkError(
            f"{directory} is not a directory of user {os.geteuid()} alone (mode 0700); others "
            "could send to its sockets. Remove it"
        )


class Receiver(Generic[M]):
    """The listening end of a link; holds its socket until closed.

    Args:
        message_type: dataclass that every header must decode to.
        run_dir: directory for the Unix socket, made with mode 0700 when missing.
        name: names the socket's file; unique in `run_dir`.
        node_id: see `Endpoint`.
        tcp_host: address to listen on over TCP as well, on a free port; None: Unix socket only.
            Over TCP nobody is heard before `admit`.
        keys: of this process; default: new ones.
    Raises:
        LinkError: others can enter `run_dir`.
    """

    def __init__(
        self,
        message_type: type[M],
        *,
        run_dir: str,
        name: str,
        node_id: str,
        tcp_host: str | None = None,
        keys: LinkKeys | None = None,
    ) -> None:
        _make_private(run_dir)
        keys = keys or LinkKeys.new()
        self._decoder = msgspec.msgpack.Decoder(message_type)
        self._context = zmq.Context(io_threads=1)
        self._sockets = [self._bind(f"ipc://{run_dir}/{name}")]
        self._gatekeeper = Gatekeeper(self._context)
        tcp = None
        if tcp_host is not None:
            socket = self._context.socket(zmq.PULL)
            socket.setsockopt(zmq.LINGER, 0)
            keys.serve(socket)
            port = socket.bind_to_random_port(f"tcp://{tcp_host}")
            self._sockets.append(socket)
            tcp = f"tcp://{tcp_host}:{port}"
        self.endpoint = Endpoint(
            node_id=node_id,
            ipc=f"ipc://{run_dir}/{name}",
            tcp=tcp,
            public_key=keys.public,
        )
        self._poller = zmq.Poller()
        for socket in [*self._sockets, self._gatekeeper.socket]:
            self._poller.register(socket, zmq.POLLIN)

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.LINGER, 0)
        socket.bind(address)
        return socket

    def admit(self, public_key: str) -> None:
        """Over TCP, hear the holder of this key from now on, and nobody else; from any thread."""
        self._gatekeeper.admit(public_key)

    def watch(self, fd: int) -> None:
        """Let `receive` return also when this file descriptor becomes readable."""
        self._poller.register(fd, zmq.POLLIN)

    def receive(self, timeout_s: float | None) -> tuple[M, memoryview] | None:
        """The next message, or None at the time limit or when a watched descriptor is ready.

        Raises:
            LinkError: the frames are not a message; nothing of it was used.
        """
        limit_ms = None if timeout_s is None else max(0, round(timeout_s * 1000))
        started = time.monotonic()
        while True:
            ready = dict(self._poller.poll(limit_ms))
            if self._gatekeeper.socket in ready:
                self._gatekeeper.answer()
                del ready[self._gatekeeper.socket]
                if not ready:  # that was no news for our caller
                    if timeout_s is not None:
                        left_s = started + timeout_s - time.monotonic()
                        limit_ms = max(0, round(left_s * 1000))
                    continue
            for socket in self._sockets:
                if socket in ready:
                    return self._read(socket)
            return None

    def _read(self, socket: zmq.Socket[bytes]) -> tuple[M, memoryview]:
        frames = socket.recv_multipart(copy=False)
        if len(frames) != 2:
            raise LinkError(f"a message of {len(frames)} frames arrived where 2 make one")
        header, payload = frames
        try:
            message = self._decoder.decode(header.buffer)
        except msgspec.DecodeError as error:
            raise LinkError(f"a header arrived that cannot be decoded: {error}") from error
        return message, payload.buffer

    def close(self) -> None:
        """Close the sockets; messages not yet received are lost."""
        for socket in self._sockets:
            socket.close(linger=0)
        self._gatekeeper.close()
        self._context.term()


class Sender:
    """The sending end of a link.

    Args:
        endpoint: where to send.
        node_id: this host's identity.
        keys: of this process, whose public one the receiver admits; default: new ones.
    Raises:
        LinkError: the endpoint is on another host and has no TCP address.
    """

    def __init__(self, endpoint: Endpoint, *, node_id: str, keys: LinkKeys | None = None) -> None:
        if endpoint.node_id != node_id and endpoint.tcp is None:
            raise LinkError(
                f"{endpoint.ipc} listens only on its own host, {endpoint.node_id}, "
                f"and this is {node_id}"
            )
        self._encoder = msgspec.msgpack.Encoder()
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.LINGER, 0)
        # Few micro-batches are ever in flight: a full queue means a dead neighbour, never load.
        self._socket.setsockopt(zmq.SNDTIMEO, 10_000)
        if endpoint.node_id == node_id:
            self._socket.connect(endpoint.ipc)
        else:
            assert endpoint.tcp is not None
            (keys or LinkKeys.new()).use(self._socket, endpoint.public_key)
            self._socket.connect(endpoint.tcp)

    def send(self, message: StepMessage | StepResult, payload: memoryview | bytes = b"") -> None:
        """Send one message; `payload` is copied if small, else must stay unchanged until sent.

        Raises:
            LinkError: the neighbour has not taken anything for 10 s, or would refuse it as too
                large.
        """
        header = self._encoder.encode(message)
        if max(len(header), len(payload)) > MAX_FRAME_BYTES:
            raise LinkError(
                f"a message of {len(header):,} and {len(payload):,} bytes is more than a link "
                f"takes ({MAX_FRAME_BYTES:,}); lower max_batch_tokens"
            )
        try:
            self._socket.send(header, zmq.SNDMORE)
            self._socket.send(payload, 0, len(payload) < COPIED_BYTES)
        except zmq.Again as error:
            raise LinkError("the neighbour has taken no message for 10 s") from error

    def close(self, linger_s: float = 0) -> None:
        """Close the socket; messages not yet sent after `linger_s` are lost."""
        self._socket.close(linger=round(1000 * linger_s))
        self._context.term()

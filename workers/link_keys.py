"""Who may send on a link: CURVE keys, and the check of a sender's. Standard ZeroMQ: CURVE
(https://rfc.zeromq.org/spec/26) encrypts and proves who holds a key, ZAP
(https://rfc.zeromq.org/spec/27) asks us whether that key may connect.

Every process of a deployment makes a pair when it starts. Public halves travel over Ray's control
calls, which are authenticated; secret halves never leave their process, as Ray does not encrypt.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import zmq
from zmq.utils import z85

log = logging.getLogger(__name__)

ZAP_ADDRESS: Final = "inproc://zeromq.zap.01"
DOMAIN: Final = b"tightfit"
HANDSHAKE_MS: Final = 10_000
"""A connection that has not proved its key by then is closed."""
MAX_FRAME_BYTES: Final = 2**30
"""Of one frame; a longer one ends its connection, before memory is taken for it."""


@dataclass(frozen=True, slots=True)
class LinkKeys:
    """One process's CURVE pair."""

    public: str
    """Z85, 40 characters."""
    secret: bytes = field(repr=False)
    """Z85; in no log, no message and no pickle."""

    @staticmethod
    def new() -> LinkKeys:
        """A pair that nobody has seen."""
        public, secret = zmq.curve_keypair()
        return LinkKeys(public.decode(), secret)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a link's secret key does not leave its process")

    def serve(self, socket: zmq.Socket[Any]) -> None:
        """Have a listening socket take only encrypted connections whose key `Gatekeeper` admits."""
        socket.curve_server = True
        socket.curve_secretkey = self.secret
        socket.zap_domain = DOMAIN
        socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)

    def use(self, socket: zmq.Socket[Any], server_key: str) -> None:
        """Have a connecting socket prove this pair, to the holder of `server_key` only."""
        socket.curve_publickey = self.public.encode()
        socket.curve_secretkey = self.secret
        socket.curve_serverkey = server_key.encode()


class Gatekeeper:
    """Answers ZeroMQ's question whether a sender's key may connect; at first, none may.

    Has no thread: whoever polls `socket` calls `answer` when it is ready; until then a connection
    waits.

    Args:
        context: of the sockets that it guards; make it before they listen.
    """

    def __init__(self, context: zmq.Context[Any]) -> None:
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(ZAP_ADDRESS)
        self._admitted: bytes | None = None

    def admit(self, public_key: str) -> None:
        """Let the holder of this key connect from now on, and nobody else; from any thread."""
        self._admitted = z85.decode(public_key)

    def answer(self) -> None:
        """Decide on one connection."""
        frames = self.socket.recv_multipart()
        version, request_id, _domain, address, _identity, mechanism = frames[:6]
        is_welcome = mechanism == b"CURVE" and frames[6:] == [self._admitted]
        if not is_welcome:
            log.warning("a link refused a connection from %s", address.decode("ascii", "replace"))
        status = (b"200", b"OK") if is_welcome else (b"400", b"the key may not connect")
        self.socket.send_multipart([version, request_id, *status, b"", b""])

    def close(self) -> None:
        """Close the socket."""
        self.socket.close(linger=0)

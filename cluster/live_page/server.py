"""Serves the live page and the JSON that it draws, to browsers. Read-only: GET, and nothing else.

It runs in threads of its own, so that a slow browser holds up neither requests nor the engine. The
page itself knows nothing; what it asks for needs a token, if the service has tokens.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from tightfit.cluster.config.addresses import is_loopback
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.live_page.snapshot import snapshot
from tightfit.cluster.monitor import Monitor

log = logging.getLogger(__name__)

MAX_CONNECTIONS = 32
CONNECTION_LIMIT_S = 15.0
"""A connection that says nothing for so long is closed."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


@cache
def page() -> tuple[bytes, str]:
    """The page, in one piece, and the Content-Security-Policy that allows nothing but it."""
    folder = files("tightfit.cluster.live_page")
    style, script, html = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("css", "js", "html")
    )
    whole = html.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; script-src {_digest(script)}; style-src {_digest(style)}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return whole.encode(), policy


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class LiveServer:
    """Serves until closed.

    Args:
        monitor: what it shows; started.
        host, port: where to listen; port 0 takes a free one.
        is_allowed: whether a bearer token may see the deployment; None: everybody may.
        tls: gives the context of a new connection, for HTTPS; None: plain HTTP.
    Raises:
        ConfigError: the address cannot be listened on.
    """

    def __init__(
        self,
        monitor: Monitor,
        host: str,
        port: int,
        *,
        is_allowed: Callable[[str], bool] | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        try:
            self._server = _Server(host.strip("[]"), port, monitor, is_allowed, tls)
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.2,), name="live", daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        """The port listened on."""
        return int(self._server.server_address[1])

    def close(self) -> None:
        """Stop answering; the port is free when this returns."""
        self._server.shutdown()
        self._server.server_close()
        self._server.end_connections()
        self._thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self,
        host: str,
        port: int,
        monitor: Monitor,
        is_allowed: Callable[[str], bool] | None,
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.monitor, self.is_allowed, self._tls = monitor, is_allowed, tls
        self.is_for_this_machine_only = is_loopback(host)
        self.token_lock = threading.Lock()
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        self._open: set[Any] = set()
        super().__init__((host, port), _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, while there are not too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole of a connection; TLS begins here, where it keeps nobody else waiting."""
        try:
            request.settimeout(CONNECTION_LIMIT_S)
            if self._tls is not None:
                request = self._tls().wrap_socket(request, server_side=True)
            self._open.add(request)
            super().process_request_thread(request, client_address)
        except OSError as error:  # ssl.SSLError is one
            log.debug("a browser's connection failed: %s", error)
            self.shutdown_request(request)
        finally:
            self._open.discard(request)
            self._room.release()

    def end_connections(self) -> None:
        """Browsers keep theirs open between two questions."""
        for request in tuple(self._open):
            with suppress(OSError):  # it has ended meanwhile
                request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection broke; that is the browser's affair."""
        log.debug("a browser's connection broke", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = CONNECTION_LIMIT_S
    server_version, sys_version = "tightfit", ""

    def do_GET(self) -> None:
        """The page, or what it shows."""
        path = self.path.partition("?")[0]
        if path not in ("/", "/live.json"):
            self._refuse(HTTPStatus.NOT_FOUND, "there is / and /live.json")
        elif not self._is_addressed_here():
            # A foreign page whose name was made to point here must not read it.
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST, "open it as http://127.0.0.1")
        elif path == "/":
            body, policy = page()
            self._answer(HTTPStatus.OK, body, "text/html", {"Content-Security-Policy": policy})
        elif not self._has_token():
            self._refuse(
                HTTPStatus.UNAUTHORIZED, "a token is needed", {"WWW-Authenticate": "Bearer"}
            )
        else:
            shown = snapshot(self.server.monitor.watch(), time.monotonic(), time.time())
            self._answer(HTTPStatus.OK, json.dumps(shown).encode(), "application/json")

    def _is_addressed_here(self) -> bool:
        if self.server.is_allowed is not None or not self.server.is_for_this_machine_only:
            return True
        host = self.headers.get("Host", "")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return name in LOOPBACK_NAMES

    def _has_token(self) -> bool:
        is_allowed = self.server.is_allowed
        if is_allowed is None:
            return True
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        with self.server.token_lock:
            return is_allowed(token.strip())

    def _refuse(
        self, status: HTTPStatus, reason: str, headers: dict[str, str] | None = None
    ) -> None:
        body = json.dumps({"error": reason}).encode()
        self._answer(status, body, "application/json", headers)

    def _answer(
        self, status: HTTPStatus, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Polls are not worth a line."""
        log.debug(format, *args)

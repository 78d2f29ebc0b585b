"""The audit log: a line of JSON for each call that asks about the deployment or changes it."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

from tightfit.cluster.errors import ConfigError

log = logging.getLogger(__name__)

STANDARD_ERROR = "-"


class AuditLog:
    """Appends lines; never holds a token, a prompt or an answer.

    The file is opened for each line, so that one which was moved away, as by logrotate, is made
    anew. A line that cannot be written is reported in the service's log, and the call goes on: a
    full disk must not keep an operator from draining.

    Args:
        target: a file, made with mode 0600 if it is missing; or "-": standard error.
    Raises:
        ConfigError: the file cannot be written.
    """

    def __init__(self, target: str) -> None:
        self._target = target
        try:
            self._append(b"")
        except OSError as error:
            raise ConfigError(
                f"audit_log: {target}: cannot be written: {error.strerror}"
            ) from error

    def _append(self, line: bytes) -> None:
        """One write, so that lines of several services do not mix."""
        if self._target == STANDARD_ERROR:
            os.write(sys.stderr.fileno(), line)
            return
        file = os.open(self._target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def write(
        self,
        method: str,
        *,
        caller: str | None,
        certificate: str | None,
        peer: str,
        result: str,
    ) -> None:
        """Add one line.

        Args:
            method: name of the method, such as "Drain".
            caller: name of the token; None: none was shown, or an unknown one.
            certificate: common name of the client's certificate; None: it has none.
            peer: address of the other end of the connection, as gRPC writes it.
            result: name of the gRPC status that the call ended with.
        """
        line = json.dumps(
            {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "method": method,
                "caller": caller,
                "certificate": certificate,
                "peer": peer,
                "result": result,
            }
        )
        try:
            self._append(f"{line}\n".encode())
        except OSError as error:
            log.error("the audit log cannot be written (%s); lost: %s", error, line)

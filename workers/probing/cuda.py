"""The GPUs of this node, by torch alone. This file has never run on one yet.

Who else is on a GPU is not asked: their memory is missing from what `mem_get_info` says is free.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Final

import torch

from tightfit.kernels.formats import OLDEST_CAPABILITY
from tightfit.workers.errors import ProbeError
from tightfit.workers.probing.rates import measure_rates
from tightfit.workers.probing.result import SMALL_BYTES, DeviceMemory, DeviceRates, LinkRate

WIDTHS: Final = (8192, 4096, 2048, 1024)
DENSE_TOKENS: Final = 2048
RATES_LIMIT_S: Final = 60.0
"""Of one GPU; nearly all of it is compiling the kernels, the first time."""
LINK_BYTES: Final = 2**26
MAX_COPIES: Final = 11
COPIES_LIMIT_S: Final = 0.1


def cuda_problem() -> str | None:
    """What lacks for using GPUs here, and the remedy; None: nothing."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install one for the driver's "
            "version of CUDA, or probe with --device cpu"
        )
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no CUDA device; check nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or probe with --device cpu"
        )
    return None


def driver_version(root: Path = Path("/")) -> str:
    """Of the NVIDIA kernel module, or "unknown"."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text(errors="replace")
    except OSError:
        return "unknown"
    found = re.search(r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)*)\s", text)
    return found[1] if found else "unknown"


def gpu_memory(index: int) -> DeviceMemory:
    """Free and total memory, with a context of this process on the GPU.

    Raises:
        ProbeError: there is no room for a context, or another process has the GPU for itself.
    """
    try:
        torch.zeros(1, device=torch.device("cuda", index))
        torch.cuda.synchronize(index)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        raise ProbeError(f"cuda:{index} cannot be used: {_first_line(error)}") from error
    return DeviceMemory(total_bytes=total, free_bytes=free, bound_by="mem_get_info")


def gpu_rates(index: int, free_bytes: int) -> DeviceRates:
    """Rates of one GPU; what was allocated for it is given back.

    Raises:
        ProbeError: it is too old, too full, or Triton lacks.
    """
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        raise ProbeError(
            f"cuda:{index} has capability {capability[0]}.{capability[1]}, and stages need "
            f"{OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]}"
        )
    try:
        with torch.cuda.device(index):
            return measure_rates(
                torch.device("cuda", index),
                free_bytes,
                widths=WIDTHS,
                dense_tokens=DENSE_TOKENS,
                limit_s=RATES_LIMIT_S,
            )
    except ModuleNotFoundError as error:
        raise ProbeError(
            f"the kernels for cuda:{index} need {error.name}; pip install 'tightfit-serve[cuda]'"
        ) from error
    except RuntimeError as error:
        raise ProbeError(f"cuda:{index} cannot be measured: {_first_line(error)}") from error
    finally:
        torch.cuda.empty_cache()


def host_link(index: int, *, is_upload: bool) -> LinkRate:
    """Between pinned host memory and a GPU, as the host sees it: copy and wait.

    Raises:
        ProbeError: the GPU or the host has no room for the buffers.
    """
    gpu = torch.device("cuda", index)
    source, target = ("cpu", str(gpu)) if is_upload else (str(gpu), "cpu")
    try:
        pinned = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
        remote = torch.empty(LINK_BYTES, dtype=torch.uint8, device=gpu)
        to, of = (remote, pinned) if is_upload else (pinned, remote)
        return _copies(source, target, to, of, (index,))
    except RuntimeError as error:
        raise ProbeError(
            f"{source} to {target} cannot be measured: {_first_line(error)}"
        ) from error
    finally:
        torch.cuda.empty_cache()


def peer_link(source: int, target: int) -> LinkRate:
    """From GPU to GPU: directly where torch may, else by way of the host.

    Raises:
        ProbeError: one of them has no room for the buffer.
    """
    names = (f"cuda:{source}", f"cuda:{target}")
    try:
        of, to = (torch.empty(LINK_BYTES, dtype=torch.uint8, device=name) for name in names)
        return _copies(*names, to, of, (source, target))
    except RuntimeError as error:
        raise ProbeError(
            f"{names[0]} to {names[1]} cannot be measured: {_first_line(error)}"
        ) from error
    finally:
        torch.cuda.empty_cache()


def _copies(
    source: str, target: str, to: torch.Tensor, of: torch.Tensor, gpus: tuple[int, ...]
) -> LinkRate:
    large_s = _copy_s(lambda: to.copy_(of, non_blocking=True), gpus)
    small_to, small_of = to[:SMALL_BYTES], of[:SMALL_BYTES]
    small_s = _copy_s(lambda: small_to.copy_(small_of, non_blocking=True), gpus)
    return LinkRate(
        source=source, target=target, bytes_per_s=of.nbytes / large_s, latency_s=small_s
    )


def _copy_s(copy: Callable[[], object], gpus: tuple[int, ...]) -> float:
    """Median seconds until a copy is done on all these GPUs."""

    def once() -> float:
        start_s = time.perf_counter()
        copy()
        for gpu in gpus:
            torch.cuda.synchronize(gpu)
        return time.perf_counter() - start_s

    once()
    times = [once()]
    end_s = time.monotonic() + COPIES_LIMIT_S
    while len(times) < MAX_COPIES and time.monotonic() < end_s:
        times.append(once())
    return median(times)


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]

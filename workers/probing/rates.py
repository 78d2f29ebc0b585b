"""How fast one device reads, copies and multiplies. T tokens, W width of the layer.

Everything is a median after a warm-up. Before each timed product a buffer larger than any cache is
read, so that weights come from memory, as in a decode step of a model that is larger than caches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.dispatch import DTYPES, NEVER, OUTLIER_EVERY, Linear, quantize_linear
from tightfit.kernels.formats import OUTLIER_THRESHOLD, Format, activation_dtype
from tightfit.workers.errors import ProbeError
from tightfit.workers.probing.result import DeviceRates, LinearRate

Run = Callable[[], object]

FORMATS: Final = (Format.BF16, Format.INT8, Format.LLM_INT8, Format.INT4, Format.INT3)
FEW_TOKENS: Final = (1, 64)
"""Of every format: a decode step, and a full batch of them or a short prompt."""
DENSE_FORMATS: Final = (Format.BF16, Format.LLM_INT8)
"""Multiply in 16 and in 8 bits; also measured at enough tokens to be bound by arithmetic."""
ITEM_LIMIT_S: Final = 0.12
MAX_RUNS: Final = 21
BUFFER_BYTES: Final = 2**28
"""At most: several times the last cache of any GPU, and of most processors."""
ROOM_FOR_LAYER: Final = 32
"""Of the bytes of a layer's fp32 weight have to be free: it, what quantising makes, and as much
again."""
ROOM_FOR_BUFFER: Final = 8


class Timer:
    """Median times on one device.

    Args:
        device: where the work is done; a GPU's own clock is read.
        limit_s: seconds from now, after which everything is timed only once.
    """

    def __init__(self, device: torch.device, limit_s: float) -> None:
        self._device, self._end_s = device, time.monotonic() + limit_s

    def median_s(self, run: Run, before: Run | None = None) -> float:
        """Seconds that `run` takes; `before` runs ahead of each, and is not timed."""
        run()
        times: list[float] = []
        end_s = time.monotonic() + ITEM_LIMIT_S
        while not times or (len(times) < MAX_RUNS and not self.is_late):
            if before is not None:
                before()
            times.append(self._once(run))
            if time.monotonic() >= end_s:
                break
        return max(median(times), 1e-9)  # a clock may be too coarse

    @property
    def is_late(self) -> bool:
        """The limit has passed."""
        return time.monotonic() >= self._end_s

    def _once(self, run: Run) -> float:
        if self._device.type == "cpu":
            start_s = time.perf_counter()
            run()
            return time.perf_counter() - start_s
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000


def full_bytes(widths: Sequence[int]) -> int:
    """What has to be free for buffers and layers of full size."""
    return max(layer_bytes(max(widths)), BUFFER_BYTES * ROOM_FOR_BUFFER)


def layer_bytes(width: int) -> int:
    """What has to be free to measure a layer of this width."""
    return 4 * width**2 * ROOM_FOR_LAYER


def measure_rates(
    device: torch.device,
    free_bytes: int,
    *,
    widths: Sequence[int],
    dense_tokens: int,
    limit_s: float,
) -> DeviceRates:
    """Rates of the current device.

    Args:
        device: `cpu`, or the current CUDA device.
        free_bytes: of its memory; buffers and layers are made to fit it.
        widths: of the layer, largest first, each half of the one before and divisible by 128; the
            largest that fits is taken.
        dense_tokens: at which products are bound by arithmetic.
        limit_s: seconds after which nothing is repeated, and layers are half as wide.

    Raises:
        ProbeError: there is no room even for the smallest layer.
    """
    fitting = [width for width in widths if layer_bytes(width) <= free_bytes]
    if not fitting:
        need = layer_bytes(min(widths))
        raise ProbeError(
            f"{device} has {free_bytes:,} bytes free, and measuring its rates takes {need:,}; "
            f"free some, and probe again"
        )
    timer = Timer(device, limit_s)
    elements = min(BUFFER_BYTES, free_bytes // ROOM_FOR_BUFFER) // 4
    with torch.inference_mode():
        buffer = torch.ones(elements, device=device)
        read_s = timer.median_s(buffer.sum)
        copy_s = _copy_s(timer, buffer)
        linears = _linears(timer, device, fitting, dense_tokens, buffer)
    return DeviceRates(
        read_bytes_per_s=buffer.nbytes / read_s,
        copy_bytes_per_s=2 * buffer.nbytes / copy_s,
        linears=tuple(linears),
    )


def _copy_s(timer: Timer, buffer: Tensor) -> float:
    other = torch.empty_like(buffer)
    return timer.median_s(lambda: other.copy_(buffer))


def _linears(
    timer: Timer, device: torch.device, widths: Sequence[int], dense_tokens: int, buffer: Tensor
) -> list[LinearRate]:
    """Every format's layer at every number of tokens; smaller ones when time is short."""
    weight = torch.empty(widths[0], widths[0], device=device).normal_(std=widths[0] ** -0.5)
    found = []
    for fmt in FORMATS:
        width = widths[1] if timer.is_late and len(widths) > 1 else widths[0]
        weight = weight[:width, :width]
        linear = quantize_linear(weight, None, fmt, device=str(device))
        for tokens in (*FEW_TOKENS, dense_tokens) if fmt in DENSE_FORMATS else FEW_TOKENS:
            inputs = _inputs(tokens, width).to(device, DTYPES[activation_dtype(fmt)])
            found.append(
                LinearRate(
                    format=fmt,
                    tokens=tokens,
                    width=width,
                    weight_bytes=linear.nbytes,
                    seconds=_linear_s(timer, linear, inputs, buffer),
                )
            )
    return found


def _linear_s(timer: Timer, linear: Linear, inputs: Tensor, buffer: Tensor) -> float:
    """Seconds of the op that a stage would choose.

    Of one token it is the few-token op, of a batch the faster, of very many the other one.
    """
    tokens = inputs.shape[0]
    crossovers: tuple[int, ...] = (NEVER,)
    if linear.has_many_op and tokens > 1:
        crossovers = (NEVER, 1) if tokens in FEW_TOKENS else (1,)
    times = []
    for crossover in crossovers:
        linear.crossover = crossover
        times.append(timer.median_s(lambda: linear(inputs), before=buffer.sum))
    return min(times)


def _inputs(tokens: int, width: int) -> Tensor:
    """[T, W] fp32 with some outlier columns, which `llm_int8` has to treat apart."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).clamp_(-4.0, 4.0)
    x[:, ::OUTLIER_EVERY] = 2 * OUTLIER_THRESHOLD
    return x

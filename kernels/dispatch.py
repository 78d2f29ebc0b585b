"""One linear layer, whatever its format: picks the op by device, format and number of tokens.

Adding a format or a device is one entry in `OPS`; the decoder sees `Linear` only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels import cpu
from tightfit.kernels.formats import Format, activation_dtype
from tightfit.kernels.weights import Int8Weight, quantize_rows

Op = Callable[[Tensor, Int8Weight], Tensor]

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}
NEVER: Final = 2**62
"""A crossover that no number of tokens reaches."""
CROSSOVER_CANDIDATES: Final = (4, 8, 16, 32, 64, 128)
MEASURE_LIMIT_S: Final = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPair:
    """The ops of one format on one device type."""

    few: Op
    """For few tokens."""
    many: Op | None
    """For many; None when `few` is always best."""


OPS: Final[dict[tuple[str, Format], OpPair]] = {
    ("cpu", Format.INT8): OpPair(few=cpu.int8_packed, many=cpu.int8_dequantized),
    ("cpu", Format.LLM_INT8): OpPair(few=cpu.int8_packed, many=cpu.llm_int8_decomposed),
}


class Linear:
    """y = x Wᵀ + b with W in some format. Call with x [T, K]; returns [T, N] in x's dtype.

    `crossover`: number of tokens from which on the many-token op is used.
    """

    __slots__ = ("_bias", "_dense", "_few", "_many", "_quantized", "crossover", "format", "n_in", "n_out")

    def __init__(
        self,
        fmt: Format,
        *,
        dense: Tensor | None,
        quantized: Int8Weight | None,
        bias: Tensor | None,
        ops: OpPair | None,
    ) -> None:
        self.format = fmt
        weight = dense if dense is not None else quantized.values if quantized else None
        if weight is None:
            raise ValueError("a Linear needs a dense or a quantised weight")
        self.n_out, self.n_in = weight.shape
        self.crossover = NEVER
        self._dense, self._quantized, self._bias = dense, quantized, bias
        self._few = ops.few if ops else None
        self._many = ops.many if ops else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._dense is not None:
            return torch.nn.functional.linear(x, self._dense, self._bias)
        assert self._quantized is not None
        op = self._few if x.shape[0] < self.crossover else self._many
        assert op is not None
        y = op(x, self._quantized)
        return y if self._bias is None else y.add_(self._bias)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, scales and bias; equals `formats.linear_bytes`."""
        weight = self._dense if self._dense is not None else self._quantized
        assert weight is not None
        return weight.nbytes + (self._bias.nbytes if self._bias is not None else 0)

    @property
    def has_many_op(self) -> bool:
        """There is a choice to make by the number of tokens."""
        return self._many is not None


def quantize_linear(
    weight: Tensor, bias: Tensor | None, fmt: Format, *, device: str = "cpu"
) -> Linear:
    """Put one layer's weight into `fmt`, in one pass; the result shares no memory with `weight`.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N] or None.
        fmt: wanted format.
        device: torch device name.
    Raises:
        ValueError: no such format on this device, or non-finite weights.
    """
    kind = device.partition(":")[0]
    act = DTYPES[activation_dtype(fmt)]
    own_bias = None if bias is None else bias.detach().to(act).clone()
    if fmt in (Format.FP32, Format.BF16):
        dense = torch.empty(weight.shape, dtype=act, device=device)
        dense.copy_(weight)
        return Linear(fmt, dense=dense, quantized=None, bias=own_bias, ops=None)
    ops = OPS.get((kind, fmt))
    if ops is None:
        known = ", ".join(str(f) for d, f in OPS if d == kind) or "none"
        raise ValueError(f"format {fmt} has no ops on device {kind}; there are: {known}")
    return Linear(fmt, dense=None, quantized=quantize_rows(weight), bias=own_bias, ops=ops)


def measure_crossover(linear: Linear) -> int:
    """Smallest measured number of tokens at which the many-token op is faster, and stays so.

    Takes at most about 0.25 s. `NEVER` when there is no choice or the few-token op always won.
    """
    if not linear.has_many_op:
        return NEVER
    kept = linear.crossover
    deadline = time.perf_counter() + MEASURE_LIMIT_S
    crossover = NEVER
    for tokens in CROSSOVER_CANDIDATES:
        x = torch.zeros((tokens, linear.n_in), dtype=torch.bfloat16)
        linear.crossover = NEVER
        few = _best_of(linear, x)
        linear.crossover = 0
        many = _best_of(linear, x)
        if many < few:
            crossover = min(crossover, tokens)
        else:
            crossover = NEVER
        if time.perf_counter() > deadline:
            # The few-token op's time grows with every token: past the limit it does not come back.
            crossover = tokens if crossover == NEVER and many < 2 * few else crossover
            break
    linear.crossover = kept
    return crossover


def _best_of(linear: Linear, x: Tensor, repeats: int = 5) -> float:
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        linear(x)
        best = min(best, time.perf_counter() - started)
    return best

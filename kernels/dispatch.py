"""One linear layer, whatever its format: picks the op by device, format and number of tokens.

Adding a format is one entry in `CPU_OPS` and one in `cuda.OPS`; the decoder sees `Linear` only.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.kernels import cpu, packed_int8
from tightfit.kernels.crossover import MEASURE_LIMIT_S, NEVER, find_crossover
from tightfit.kernels.formats import (
    DECOMPOSED_WIDTH,
    OUTLIER_THRESHOLD,
    Format,
    activation_dtype,
)
from tightfit.kernels.groups import GroupWeight, Quantized, pack_groups, quantize_groups
from tightfit.kernels.ops import Kernel, OpPair, PackedWeight, dense_ops
from tightfit.kernels.packed_int8 import PackedInt8Weight
from tightfit.kernels.weights import Int8Weight

__all__ = [
    "CPU_OPS",
    "DTYPES",
    "NEVER",
    "Linear",
    "OpPair",
    "hold_linear",
    "measure_crossover",
    "quantize_linear",
]

DTYPES: Final = {"fp32": torch.float32, "bf16": torch.bfloat16}

OUTLIER_EVERY: Final = 512
"""One feature column in so many is an outlier while measuring: as in 6.7B models and above, roughly
(arXiv 2208.07339, section 4.1: up to 7 of 4,096)."""


def _pack_int3(weight: Tensor, group_size: int | None, device: str) -> GroupWeight:
    return quantize_groups(weight, bits=3, group_size=group_size, device=device)


CPU_OPS: Final[dict[Format, OpPair[Any]]] = {
    Format.FP32: dense_ops(torch.float32),
    Format.BF16: dense_ops(torch.bfloat16),
    Format.INT8: OpPair(
        pack=packed_int8.pack_int8,
        hold=packed_int8.hold_int8,
        few=packed_int8.bind_few,
        many=packed_int8.bind_many,
    ),
    Format.LLM_INT8: OpPair(
        pack=packed_int8.pack_int8,
        hold=packed_int8.hold_int8,
        few=packed_int8.bind_few,
        many=packed_int8.bind_many_llm_int8,
    ),
    Format.INT4: OpPair(
        pack=cpu.pack_int4,
        hold=cpu.hold_int4,
        few=cpu.bind_int4_packed,
        many=cpu.bind_dequantized,
    ),
    Format.INT3: OpPair(pack=_pack_int3, hold=pack_groups, few=cpu.bind_dequantized),
}


class Linear:
    """y = x Wᵀ + b with W in some format. Call with x [T, K]; returns [T, N] in x's dtype.

    x is bf16, or fp32 for `Format.FP32` (`formats.activation_dtype`), of any strides.
    `crossover`: number of tokens from which on the many-token op is used; `NEVER` until it is set.
    """

    __slots__ = (
        "_few",
        "_many",
        "bias",
        "crossover",
        "device",
        "format",
        "n_in",
        "n_out",
        "nbytes",
        "weight",
    )

    def __init__(
        self,
        fmt: Format,
        weight: PackedWeight,
        bias: Tensor | None,
        *,
        shape: tuple[int, int],
        ops: OpPair[Any] | None = None,
        order: Tensor | None = None,
        device: str,
    ) -> None:
        """Made by `quantize_linear` and `hold_linear`; `ops`: if not those of the format."""
        ops = ops or _ops(fmt, device)
        self.n_out, self.n_in = shape
        act = DTYPES[activation_dtype(fmt)]
        self.format, self.device = fmt, device
        self.bias = None if bias is None else bias.detach().to(device, act, copy=True)
        """[N], in the dtype of the activations, or None."""
        self.weight: PackedWeight = weight
        """As the format's `OpPair` made it."""
        parts = (self.weight, self.bias, order)
        self.nbytes = sum(part.nbytes for part in parts if part is not None)
        """Bytes of weight, scales and bias; `formats.linear_bytes`, and 4 K with an order."""
        self.crossover = NEVER
        self._few = _ordered(ops.few(weight, self.bias), order)
        many = ops.many(weight, self.bias) if ops.many else None
        self._many = _ordered(many, order) if many else self._few

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] → [T, N]."""
        return self._few(x) if x.shape[0] < self.crossover else self._many(x)

    @property
    def has_many_op(self) -> bool:
        """There is a choice to make by the number of tokens."""
        return self._many is not self._few


def _ops(fmt: Format, device: str) -> OpPair[Any]:
    kind = device.partition(":")[0]
    if kind == "cuda":
        from tightfit.kernels import cuda  # imports Triton, which a CPU host need not have

        return cuda.OPS[fmt]
    if kind != "cpu":
        raise ValueError(f"format {fmt} has no ops on device {device}: there are cpu and cuda")
    return CPU_OPS[fmt]


def _ordered(kernel: Kernel, order: Tensor | None) -> Kernel:
    """The op for a weight whose input features lie in another order than x's."""
    if order is None:
        return kernel
    return lambda x: kernel(x.index_select(1, order))


def _layer_ops(
    fmt: Format, shape: tuple[int, int], outlier_threshold: float | None, device: str
) -> OpPair[Any]:
    """The format's; of a small layer in `llm_int8` `int8`'s, unless there is a threshold."""
    is_whole = outlier_threshold is None and min(shape) < DECOMPOSED_WIDTH
    return _ops(Format.INT8 if fmt is Format.LLM_INT8 and is_whole else fmt, device)


def _with_threshold(weight: PackedWeight, outlier_threshold: float | None) -> PackedWeight:
    if outlier_threshold is not None and isinstance(weight, Int8Weight | PackedInt8Weight):
        return replace(weight, outlier_threshold=outlier_threshold)
    return weight


def _checked_shape(weight: Tensor, bias: Tensor | None) -> tuple[int, int]:
    """(N, K) of a weight whose bias, if any, fits it."""
    if weight.ndim != 2:
        raise ValueError(f"a linear layer's weight is [N, K], not {list(weight.shape)}")
    n_out, n_in = weight.shape
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"a bias of {list(bias.shape)} does not fit a weight of {[n_out, n_in]}")
    return n_out, n_in


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    fmt: Format,
    *,
    group_size: int | None = None,
    outlier_threshold: float | None = OUTLIER_THRESHOLD,
    device: str = "cpu",
) -> Linear:
    """Put one layer's weight into `fmt`, in one pass; the result shares no memory with `weight`.

    Args:
        weight: [N, K], any floating dtype.
        bias: [N] or None.
        fmt: wanted format.
        group_size: input features that share a scale in `int4` and `int3`; None: the default.
        outlier_threshold: of `llm_int8`; None: 6.0, in layers at least `DECOMPOSED_WIDTH` wide both
            ways; smaller ones compute as in `int8`, with any number of tokens.
        device: torch device name.
    Raises:
        ValueError: no such format on this device, shapes that do not fit, or non-finite weights.
    """
    shape = _checked_shape(weight, bias)
    ops = _layer_ops(fmt, shape, outlier_threshold, device)
    packed = _with_threshold(ops.pack(weight.detach(), group_size, device), outlier_threshold)
    return Linear(fmt, packed, bias, ops=ops, shape=shape, device=device)


def hold_linear(
    weight: Quantized,
    bias: Tensor | None,
    fmt: Format,
    *,
    order: Tensor | None = None,
    outlier_threshold: float | None = OUTLIER_THRESHOLD,
    device: str = "cpu",
) -> Linear:
    """Take one layer's weight that is quantised already, its numbers kept but for scales rounded to
    bf16.

    Args:
        weight: [N, K].
        bias: [N] or None.
        fmt: `int8`, `llm_int8`, `int4` or `int3`, of as many bits.
        order: [K] whole numbers: column i of the weight belongs to input feature order[i].
        outlier_threshold: of `llm_int8`; None: 6.0, in layers at least `DECOMPOSED_WIDTH` wide both
            ways; smaller ones compute as in `int8`, with any number of tokens.
        device: torch device name.
    Raises:
        ValueError: the format cannot hold these numbers, or shapes that do not fit.
    """
    shape = _checked_shape(weight.integers, bias)
    ops = _layer_ops(fmt, shape, outlier_threshold, device)
    if ops.hold is None:
        raise ValueError(f"{fmt} holds no quantised numbers")
    index = None if order is None else order.to(device, torch.int32)
    packed = _with_threshold(ops.hold(weight.to(device)), outlier_threshold)
    return Linear(fmt, packed, bias, ops=ops, shape=shape, order=index, device=device)


def measure_crossover(linear: Linear, *alike: Linear, limit_s: float = MEASURE_LIMIT_S) -> int:
    """Number of tokens from which on `linear`'s many-token op is faster, measured here and now.

    Sets nothing. Takes about `limit_s` at most. `NEVER` when there is no choice, or when the
    few-token op always won.

    Args:
        linear: one layer of a shape and format.
        alike: others of the same shape and format. Runs go round all of them, so that weights come
            from memory, as in a decode step, and not from a cache that holds one layer.
        limit_s: seconds after which no further number of tokens is tried.
    """
    if not linear.has_many_op:
        return NEVER
    layers = (linear, *alike)
    dtype = DTYPES[activation_dtype(linear.format)]
    inputs: dict[int, Tensor] = {}
    turn = 0

    def run(tokens: int, *, many: bool) -> None:
        nonlocal turn
        if tokens not in inputs:
            inputs[tokens] = _typical_input(tokens, linear.n_in).to(linear.device, dtype)
        layer = layers[turn % len(layers)]
        turn += 1
        (layer._many if many else layer._few)(inputs[tokens])
        if inputs[tokens].is_cuda:
            torch.cuda.synchronize(inputs[tokens].device)

    with torch.inference_mode():
        return find_crossover(partial(run, many=False), partial(run, many=True), limit_s=limit_s)


def _typical_input(tokens: int, n_in: int) -> Tensor:
    """[T, K] fp32 with some outlier columns, which cost `llm_int8` time, as real activations do."""
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(0)).clamp_(-4.0, 4.0)
    x[:, ::OUTLIER_EVERY] *= 5.0
    return x

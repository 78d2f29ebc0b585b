"""CPU arithmetic on quantised weights, through torch's packed ops.

Each format has an op for few tokens, bound by reading weights, and may have one for many, bound by
arithmetic. Which is faster from how many tokens on is measured at load (`dispatch.measure_crossover`).
T tokens, N output features, K input features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.kernels.reference import OUTLIER_THRESHOLD
from tightfit.kernels.weights import INT8_MAX, Int8Weight

PACKED_K_MULTIPLE = 32
"""`torch._weight_int8pack_mm` reads past the end of rows that are no multiple of this (torch 2.13)."""

DEQUANTIZE_ROWS = 4096
"""Output channels widened at a time: bounds the scratch to 4096 × K bf16."""


def int8_packed(x: Tensor, weight: Int8Weight) -> Tensor:
    """Weight-only int8 for few tokens: the weight is read once, as bytes.

    K that is no multiple of 32 takes the other op, for safety.

    Args:
        x: [T, K] bf16. (torch's kernel has no fast path for fp32.)
        weight: [N, K].
    Returns:
        [T, N] bf16.
    """
    if x.shape[1] % PACKED_K_MULTIPLE:
        return int8_dequantized(x, weight)
    return torch._weight_int8pack_mm(x, weight.values, weight.scale)


def int8_dequantized(x: Tensor, weight: Int8Weight) -> Tensor:
    """Weight-only int8 for many tokens: widen some rows to bf16, multiply, go on. As `int8_packed`."""
    n_out = weight.values.shape[0]
    y = torch.empty((x.shape[0], n_out), dtype=x.dtype)
    for first in range(0, n_out, DEQUANTIZE_ROWS):
        rows = slice(first, first + DEQUANTIZE_ROWS)
        wide = weight.values[rows].to(x.dtype).mul_(weight.scale[rows, None])
        y[:, rows] = torch.nn.functional.linear(x, wide)
    return y


def llm_int8_decomposed(x: Tensor, weight: Int8Weight) -> Tensor:
    """LLM.int8() (see `reference.llm_int8_linear`) with `torch._int_mm`.

    Args:
        x: [T, K] bf16.
        weight: [N, K].
    Returns:
        [T, N] bf16.
    """
    outlier = x.abs().amax(dim=0) >= OUTLIER_THRESHOLD
    columns = outlier.nonzero().flatten()
    regular = x.float()
    if columns.numel():
        regular.index_fill_(1, columns, 0.0)
    scale_x = regular.abs().amax(dim=1, keepdim=True).div_(INT8_MAX)
    scale_x.masked_fill_(scale_x == 0, 1.0)
    x8 = regular.div_(scale_x).round_().to(torch.int8)
    y = torch._int_mm(x8, weight.values.t()).float().mul_(scale_x).mul_(weight.scale)
    if columns.numel():
        wide = weight.values[:, columns].float().mul_(weight.scale.float()[:, None])
        y.addmm_(x[:, columns].float(), wide.t())
    return y.to(x.dtype)

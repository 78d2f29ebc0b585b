"""What every kernel computes, in plain torch. The reference is the specification.

T tokens, N output features, K input features. Given fp64 inputs it computes in fp64.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.groups import GroupWeight
from tightfit.kernels.weights import INT8_MAX, Int8Weight

OUTLIER_THRESHOLD: Final = 6.0
"""|x| from which a feature column is an outlier (arXiv 2208.07339, section 3.2)."""


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Weight-only int8: x [T, K] times the dequantised weight, in x's dtype, [T, N]."""
    y = x @ weight.dequantize(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def group_linear(x: Tensor, weight: GroupWeight, bias: Tensor | None = None) -> Tensor:
    """Weight-only int4 or int3: x [T, K] times the dequantised weight, in x's dtype, [T, N]."""
    y = x @ weight.dequantize(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def llm_int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """LLM.int8(): outlier feature columns in x's precision, the rest in int8 × int8 → int32.

    A column k is an outlier when any |x[:, k]| ≥ 6. The other columns are quantised row by row with
    their own absmax. y = (x8 · w8ᵀ) · sx · sw + x_out · W_outᵀ + b.

    Args:
        x: [T, K] floating.
        weight: [N, K].
        bias: [N] or None.
    Returns:
        [T, N], dtype of x.
    """
    outlier = (x.abs() >= OUTLIER_THRESHOLD).any(dim=0)
    regular = torch.where(outlier, torch.zeros_like(x), x)
    scale_x = regular.abs().amax(dim=1, keepdim=True) / INT8_MAX
    scale_x = torch.where(scale_x == 0, torch.ones_like(scale_x), scale_x)
    x8 = (regular / scale_x).round().clamp(-INT8_MAX, INT8_MAX)
    dot = (x8.double() @ weight.values.double().T).to(x.dtype)  # exact: integers below 2^53
    y = dot * scale_x * weight.scale.to(x.dtype)
    y = y + x[:, outlier] @ weight.dequantize(x.dtype)[:, outlier].T
    return y if bias is None else y + bias.to(x.dtype)

"""One linear layer rounded by itself, for a scheme; what a stage computes with afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.kernels.groups import INT8_MIDDLE, Quantized, pack_groups, round_to_nearest
from tightfit.kernels.hqq import hqq
from tightfit.kernels.weights import quantize_rows
from tightfit.workers.stored import StoredScheme


def round_weight(weight: Tensor, scheme: StoredScheme, *, is_fitted: bool = False) -> Quantized:
    """Round a weight to nearest, or where `is_fitted` its 4 or 3 bits by HQQ.

    Args:
        weight: [N, K] floating; not changed.
        scheme: one that `quantized_config.written_scheme` gives.
        is_fitted: of no account for 8 bits.
    Raises:
        ValueError: the weight has NaN or infinite entries, or no whole number of groups.
    """
    if scheme.bits == 8:
        rows = quantize_rows(weight)
        scale = rows.scale[:, None]
        return Quantized(
            bits=8,
            integers=rows.values.view(torch.uint8).add(INT8_MIDDLE),
            scale=scale,
            zero_point=torch.full_like(scale, INT8_MIDDLE),
        )
    if is_fitted:
        return hqq(
            weight,
            bits=scheme.bits,
            group_size=scheme.group_size,
            has_real_zero=scheme.has_real_zero,
        )
    return round_to_nearest(weight, bits=scheme.bits, group_size=scheme.group_size)


def held_weight(weight: Quantized) -> Tensor:
    """The weight that a stage computes with, [N, K] fp32: scales and zeros rounded as it does."""
    return weight.dequantize() if weight.bits == 8 else pack_groups(weight).dequantize()

"""Packed weights and how they are made. N output features, K input features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.formats import OUTLIER_THRESHOLD

INT8_MAX: Final = 127

SCRATCH_ELEMENTS: Final = 2**20
"""Elements widened to fp32 at a time while quantising: a scratch of 4 MB, which stays in cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """A linear layer's weight in int8, one scale per output channel."""

    values: Tensor
    """[N, K] int8 in [-127, 127], contiguous."""
    scale: Tensor
    """[N] bf16, positive: weight ≈ values · scale."""
    outlier_threshold: float = OUTLIER_THRESHOLD
    """LLM.int8()'s, in whose products alone it counts."""

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for, [N, K]."""
        return self.values.to(dtype) * self.scale.to(dtype)[:, None]


def check_matrix(weight: Tensor) -> None:
    """Raise ValueError where `weight` is no floating matrix."""
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"a weight to quantise is a floating matrix [N, K], not {weight.dtype} "
            f"{list(weight.shape)}"
        )


def check_finite(rows: Tensor, first: int = 0) -> None:
    """Raise ValueError that names the row where some rows of a weight, from `first` on, have NaN or
    infinite entries."""
    # The extremes of a row are not finite when any entry is not; finding them is the faster way.
    finite = torch.isfinite(rows.amin(1)) & torch.isfinite(rows.amax(1))
    if not bool(finite.all()):
        row = first + int((~finite).nonzero()[0])
        raise ValueError(f"the weight has a NaN or infinite entry in row {row}")


def quantize_rows(weight: Tensor, *, device: str = "cpu") -> Int8Weight:
    """Row-wise absmax, round to nearest (LLM.int8(), arXiv 2208.07339, eq. 4, per output channel).

    The scale is rounded to bf16 first and the values are computed with the rounded one, so that its
    rounding costs nothing. Rows of zeros get scale 1. One pass: each block of rows is read once.

    Args:
        weight: [N, K], any floating dtype, any strides; not changed, no memory shared.
        device: where the packed weight is to be.
    Raises:
        ValueError: the weight is no floating matrix, or has NaN or infinite entries.
    """
    check_matrix(weight)
    n_out, n_in = weight.shape
    values = torch.empty((n_out, n_in), dtype=torch.int8, device=device)
    scale = torch.empty(n_out, dtype=torch.bfloat16, device=device)
    step = max(1, SCRATCH_ELEMENTS // max(1, n_in))
    for first in range(0, n_out, step):
        rows = slice(first, first + step)
        part = weight[rows].to(device=device, dtype=torch.float32, copy=True)
        absmax = part.abs().amax(dim=1) if n_in else part.new_zeros(part.shape[0])
        finite = torch.isfinite(absmax)
        if not bool(finite.all()):
            row = first + int((~finite).nonzero()[0])
            raise ValueError(f"weight {[n_out, n_in]} has a NaN or infinite entry in row {row}")
        part_scale = absmax.div_(INT8_MAX).to(torch.bfloat16)
        part_scale.masked_fill_(part_scale == 0, 1.0)
        scale[rows] = part_scale
        part.div_(part_scale[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
        values[rows] = part
    return Int8Weight(values=values, scale=scale)

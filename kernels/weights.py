"""Quantised weights: packing and unpacking. T tokens, N output features, K input features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Weight:
    """A linear layer's weight in int8, one scale per output channel."""

    values: Tensor
    """[N, K] int8 in [-127, 127]."""
    scale: Tensor
    """[N] bf16: weight ≈ values · scale."""

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + self.scale.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the integers stand for, [N, K]."""
        return self.values.to(dtype) * self.scale.to(dtype)[:, None]


def quantize_rows(weight: Tensor) -> Int8Weight:
    """Row-wise absmax, round to nearest (LLM.int8(), arXiv 2208.07339, eq. 4, per output channel).

    The scale is rounded to bf16 first and the values are computed with the rounded one, so that its
    rounding costs nothing. Rows of zeros get scale 1.

    Args:
        weight: [N, K], any floating dtype.
    Raises:
        ValueError: the weight has NaN or infinite entries.
    """
    absmax = weight.abs().amax(dim=1).float()
    if not bool(torch.isfinite(absmax).all()):
        row = int((~torch.isfinite(absmax)).nonzero()[0])
        raise ValueError(f"weight {list(weight.shape)} has a NaN or infinite entry in row {row}")
    scale = (absmax / INT8_MAX).to(torch.bfloat16)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    values = torch.empty(weight.shape, dtype=torch.int8)
    rows = max(1, 2**22 // weight.shape[1])  # bounds the float scratch to 16 MB
    for first in range(0, weight.shape[0], rows):
        part = weight[first : first + rows].float() / scale[first : first + rows, None].float()
        values[first : first + rows] = part.round_().clamp_(-INT8_MAX, INT8_MAX).to(torch.int8)
    return Int8Weight(values=values, scale=scale)

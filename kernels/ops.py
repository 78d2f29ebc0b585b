"""What one format is on one type of device: how it is packed, and its ops for few and many tokens.

T tokens, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tightfit.kernels.groups import INT8_MIDDLE, Quantized
from tightfit.kernels.weights import Int8Weight, quantize_rows

Kernel = Callable[[Tensor], Tensor]
"""x [T, K] → [T, N], in x's dtype."""


class PackedWeight(Protocol):
    """A weight in its final format: a tensor, or several with their scales."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""


W = TypeVar("W", bound=PackedWeight)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPair(Generic[W]):
    """How one format is packed and multiplied on one type of device."""

    pack: Callable[[Tensor, int | None, str], W]
    """(weight [N, K] of any floating dtype, group size, device name) → the packed weight, owning
    its memory."""
    hold: Callable[[Quantized], W] | None = None
    """Weights that are quantised already, their numbers kept; None: this format has none."""
    few: Callable[[W, Tensor | None], Kernel]
    """(packed weight, bias) → the op for few tokens."""
    many: Callable[[W, Tensor | None], Kernel | None] | None = None
    """The same for many tokens; None when `few` is always best, of any weight or of this one."""


def bind_dense(weight: Tensor, bias: Tensor | None) -> Kernel:
    """x · Wᵀ + b with the weight [N, K] as it is, in x's dtype."""
    linear = torch.nn.functional.linear

    def dense(x: Tensor) -> Tensor:
        return linear(x, weight, bias)

    return dense


def _pack_dense(weight: Tensor, _: int | None, device: str, *, dtype: torch.dtype) -> Tensor:
    return torch.empty(weight.shape, dtype=dtype, device=device).copy_(weight)


def dense_ops(dtype: torch.dtype) -> OpPair[Tensor]:
    """Of weights that are not quantised, on any device."""
    return OpPair(pack=partial(_pack_dense, dtype=dtype), few=bind_dense)


def pack_int8(weight: Tensor, _: int | None, device: str) -> Int8Weight:
    """See `quantize_rows`."""
    return quantize_rows(weight, device=device)


def hold_int8(weight: Quantized) -> Int8Weight:
    """Raises ValueError unless the weight is symmetric, with one scale per output channel."""
    if weight.scale.shape[1] != 1 or bool((weight.zero_point != INT8_MIDDLE).any()):
        raise ValueError("int8 has one scale per output channel and no zero points")
    values = weight.integers.sub(INT8_MIDDLE).view(torch.int8)
    return Int8Weight(values=values, scale=weight.scale[:, 0].to(torch.bfloat16))

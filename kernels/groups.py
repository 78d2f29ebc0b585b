"""Weights of 4 and 3 bits, asymmetric, in groups of input features: packed, unpacked, quantised.

N output features, K input features, G groups. weight[n, k] ≈ (q[n, k] - z[n, g]) · scale[n, g] with
q and the zero point z whole numbers in [0, 2^bits), and g the group of k: what GPTQ (arXiv
2210.17323), AWQ and compressed-tensors store. Held is zero = (2^(bits - 1) - z) · scale, the value
of the middle integer, so that weight = (q - 2^(bits - 1)) · scale + zero: the form that torch's
packed op for 4 bits takes on the CPU, and that a z of any kind fits.

How the integers lie in memory: `packing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.formats import TILE_ROWS, default_group_size
from tightfit.kernels.packing import (
    BLOCK_ROWS,
    Layout,
    pack,
    unpack_blocks,
    unpack_rows,
    unpack_tiles,
)
from tightfit.kernels.weights import SCRATCH_ELEMENTS, check_finite, check_matrix

INT8_MIDDLE: Final = 128
"""The integer of `Quantized` that stands for 0 in symmetric 8 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupWeight:
    """A linear layer's weight in 4 or 3 bits with a scale and a zero point per group."""

    bits: int
    """4 or 3."""
    n_in: int
    """K, which the packed integers alone may not tell."""
    group_size: int
    """Input features that share scale and zero; divides K."""
    layout: Layout
    packed: Tensor
    """The integers; see the module's text."""
    scale_zero: Tensor
    """[G, N, 2] bf16: scale (of either sign), then zero: the value of the middle integer."""

    @property
    def n_out(self) -> int:
        """N."""
        return self.scale_zero.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of integers, scales and zeros."""
        return self.packed.nbytes + self.scale_zero.nbytes

    def integers(self, first: int = 0, end: int | None = None) -> Tensor:
        """q of rows first to end, [rows, K] uint8 or int32. But in `Layout.ROWS`, `first` is a
        multiple of 64, and so is `end` if it is not N."""
        end = self.n_out if end is None else end
        if self.layout is Layout.TILES:
            tiles = self.packed[first // TILE_ROWS : -(-end // TILE_ROWS)]
            return unpack_tiles(tiles, bits=self.bits, n_out=end - first, n_in=self.n_in)
        if self.layout is Layout.BLOCKS:
            return unpack_blocks(self.packed[first // BLOCK_ROWS : -(-end // BLOCK_ROWS)])
        return unpack_rows(self.packed[first:end], bits=self.bits, n_in=self.n_in)

    def dequantize(
        self, dtype: torch.dtype = torch.float32, first: int = 0, end: int | None = None
    ) -> Tensor:
        """Rows first to end of the weight that the integers stand for, [rows, K]."""
        end = self.n_out if end is None else end
        # In fp32 and in two steps: `torch.addcmul` takes five times as long where it broadcasts.
        grouped = self.integers(first, end).float().sub_(2 ** (self.bits - 1))
        grouped = grouped.view(end - first, -1, self.group_size)
        pairs = self.scale_zero[:, first:end].float().permute(2, 1, 0)
        scale, zero = pairs.contiguous().unsqueeze(-1)
        return grouped.mul_(scale).add_(zero).to(dtype).view(end - first, self.n_in)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What a quantisation method computes, and a quantised checkpoint stores: not packed yet."""

    bits: int
    """8, 4 or 3."""
    integers: Tensor
    """[N, K] uint8 in [0, 2^bits)."""
    scale: Tensor
    """[N, G], floating: input features g · K / G to (g + 1) · K / G share scale g."""
    zero_point: Tensor
    """[N, G], of any dtype: whole numbers in [0, 2^bits), or after `hqq` any."""

    def to(self, device: str) -> Quantized:
        """The same on a device."""
        return Quantized(
            bits=self.bits,
            integers=self.integers.to(device),
            scale=self.scale.to(device),
            zero_point=self.zero_point.to(device),
        )

    def rows(self, index: Tensor) -> Quantized:
        """Some output features, in this order."""
        return Quantized(
            bits=self.bits,
            integers=self.integers[index],
            scale=self.scale[index],
            zero_point=self.zero_point[index],
        )

    def dequantize(self) -> Tensor:
        """The weight that is meant, [N, K] fp32."""
        n_out, num_groups = self.scale.shape
        grouped = self.integers.float().view(n_out, num_groups, -1)
        grouped.sub_(self.zero_point.float()[..., None]).mul_(self.scale.float()[..., None])
        return grouped.view(n_out, -1)


def grid(groups: Tensor, *, bits: int, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and zero point that span each group and 0, by least and greatest value.

    The scale is rounded to bf16 first, and the zero point fits the rounded one.

    Args:
        groups: [..., group size], finite.
        bits: of the integers.
        share: of that range, to span less of it more finely; values outside are cut off.
    Returns:
        scale [...] bf16, positive; zero point [...] fp32, whole numbers in [0, 2^bits).
    """
    highest = 2**bits - 1
    wide = groups.float()
    least, greatest = wide.amin(-1), wide.amax(-1)  # `aminmax` takes ten times as long
    least, greatest = least.clamp_max_(0.0).mul_(share), greatest.clamp_min_(0.0).mul_(share)
    # Divided before they are subtracted: the difference of two finite values may not be finite.
    scale = (greatest / highest - least / highest).to(torch.bfloat16)
    scale.masked_fill_(scale == 0, 1.0)
    return scale, (-least / scale).round_().clamp_(0, highest)


def pack_groups(weight: Quantized, *, layout: Layout = Layout.ROWS) -> GroupWeight:
    """A weight of 4 or 3 bits packed, on the same device; `BLOCKS` wants 4 bits and N a multiple of
    64.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    integers, scale, zero_point, bits = (
        weight.integers, weight.scale, weight.zero_point, weight.bits,
    )  # fmt: skip
    n_out, n_in = integers.shape
    num_groups = scale.shape[-1]
    if scale.shape != zero_point.shape or scale.shape[0] != n_out or n_in % num_groups:
        raise ValueError(
            f"integers {[n_out, n_in]} want a scale and a zero point [{n_out}, G] with G a divisor "
            f"of {n_in}, not {list(scale.shape)} and {list(zero_point.shape)}"
        )
    zero = (2 ** (bits - 1) - zero_point.float()) * scale.float()
    pairs = torch.stack((scale.to(torch.bfloat16), zero.to(torch.bfloat16)), -1)
    return GroupWeight(
        bits=bits,
        n_in=n_in,
        group_size=n_in // num_groups,
        layout=layout,
        packed=pack(integers, bits=bits, layout=layout),
        scale_zero=pairs.transpose(0, 1).contiguous(),
    )


def quantize_groups(
    weight: Tensor,
    *,
    bits: int,
    group_size: int | None = None,
    layout: Layout = Layout.ROWS,
    device: str = "cpu",
) -> GroupWeight:
    """Round to nearest on the `grid` of each group.

    One pass: each block of rows is read once, and widened to fp32 by itself.

    Args:
        weight: [N, K], any floating dtype, any strides; not changed, no memory shared.
        bits: 4 or 3.
        group_size: input features that share a scale, a divisor of K; `default_group_size` if None.
        layout: of the result; `BLOCKS` wants 4 bits and N a multiple of 64.
        device: where the packed weight is to be.
    Raises:
        ValueError: the weight is no floating matrix, has NaN or infinite entries, or has no whole
            number of groups.
    """
    check_matrix(weight)
    n_in = weight.shape[1]
    group_size = default_group_size(n_in) if group_size is None else group_size
    parts = [
        pack_groups(part, layout=layout)
        for part in _rounded(weight, bits=bits, group_size=group_size, device=device)
    ]
    return GroupWeight(
        bits=bits,
        n_in=n_in,
        group_size=group_size,
        layout=layout,
        packed=torch.cat([part.packed for part in parts]),
        scale_zero=torch.cat([part.scale_zero for part in parts], 1),
    )


def round_to_nearest(weight: Tensor, *, bits: int, group_size: int | None = None) -> Quantized:
    """The same, not packed; None: one group for each output channel.

    Raises:
        ValueError: as `quantize_groups`.
    """
    check_matrix(weight)
    size = weight.shape[1] if group_size is None else group_size
    parts = list(_rounded(weight, bits=bits, group_size=size, device=str(weight.device)))
    return Quantized(
        bits=bits,
        integers=torch.cat([part.integers for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat([part.zero_point for part in parts]),
    )


def _rounded(weight: Tensor, *, bits: int, group_size: int, device: str) -> Iterator[Quantized]:
    """Blocks of rows, each read once and widened to fp32 by itself."""
    n_out, n_in = weight.shape
    if n_in % group_size:
        raise ValueError(f"groups of {group_size} do not divide {n_in} input features")
    step = max(BLOCK_ROWS, SCRATCH_ELEMENTS // max(1, n_in) // BLOCK_ROWS * BLOCK_ROWS)
    for first in range(0, n_out, step):
        wide = weight[first : first + step].to(device=device, dtype=torch.float32, copy=True)
        check_finite(wide, first)
        groups = wide.view(wide.shape[0], -1, group_size)
        scale, zero_point = grid(groups, bits=bits)
        groups.div_(scale.float()[..., None]).round_().add_(zero_point[..., None])
        integers = wide.clamp_(0, 2**bits - 1).to(torch.uint8)
        yield Quantized(bits=bits, integers=integers, scale=scale, zero_point=zero_point)

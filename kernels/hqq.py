"""HQQ: scales and zero points fitted to the weights alone, without calibration.

For each group of weights w the integers q, the scale s and the zero point z, which here is any
number, are to make the errors w - (q - z) · s sparse: small for most weights, where a few take the
rest. Half-quadratic splitting (Badri and Shaji, "Half-quadratic quantization of large machine
learning models", 2023; p = 0.7) alternates, with errors in units of s,

    q ← clamp(round(w / s + z))
    e ← shrink(w - (q - z) · s),   shrink(x) = sign(x) · max(|x| - |x|^(p - 1) / β, 0)
    s, z ← least squares for w - e ≈ (q - z) · s

with β growing. Unlike the paper's, errors are in units of the scale, so that β means the same for
every group, and the scale is fitted too. Of all steps and the `grid` of least and greatest value,
each group keeps what has the smallest sum of cubes in the precision in which it is held; a group
with a value far above the others keeps the `grid`, which has that value almost exactly: a few such
weights make a model's largest activations, and a model without them is lost (Yu et al., "The super
weight in large language models", arXiv 2411.07191).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.groups import Quantized, grid
from tightfit.kernels.weights import SCRATCH_ELEMENTS, check_finite, check_matrix

STEPS: Final = 20
POWER: Final = 0.7
"""p, of the norm that makes errors sparse."""
FIRST_BETA: Final = 10.0
BETA_GROWTH: Final = 1.01
LOSS_POWER: Final = 3.0
"""Of errors, by which a group's steps are compared. With squares, SmolLM2's layers 2 and 11 lose 2
and 8 times as much at 3 bits as rounded to nearest."""
OUTLIER_RMS: Final = 5.0
"""A value is far above the others from so many times its group's root mean square on."""
TINY: Final = 1e-12
"""Below any error: keeps powers and quotients finite."""


def hqq(
    weight: Tensor, *, bits: int, group_size: int | None = None, has_real_zero: bool = True
) -> Quantized:
    """Round a weight on a grid that is fitted to it.

    Args:
        weight: [N, K], any floating dtype; not changed.
        bits: 4 or 3.
        group_size: input features that share a scale, a divisor of K; None: all of a channel.
        has_real_zero: zero points are any numbers; else whole ones in [0, 2^bits), so that 0 is one
            of the values. With few bits that is the better: SmolLM2's 3-bit perplexity is 111
            with whole ones and 208 with real ones (fp32: 41).
    Returns:
        scales and zero points in bf16.
    Raises:
        ValueError: the weight is no floating matrix, has NaN or infinite entries, or has no whole
            number of groups.
    """
    check_matrix(weight)
    n_out, n_in = weight.shape
    size = n_in if group_size is None else group_size
    if n_in % size:
        raise ValueError(f"groups of {size} do not divide {n_in} input features")
    parts = []
    step = max(1, SCRATCH_ELEMENTS // max(1, n_in))
    for first in range(0, n_out, step):
        rows = weight[first : first + step].float()
        check_finite(rows, first)
        parts.append(_fit(rows.view(len(rows), -1, size), bits, has_real_zero))
    integers, scales, zero_points = zip(*parts, strict=True)
    return Quantized(
        bits=bits,
        integers=torch.cat(integers).view(n_out, n_in),
        scale=torch.cat(scales),
        zero_point=torch.cat(zero_points),
    )


def _fit(groups: Tensor, bits: int, has_real_zero: bool) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, G, size] fp32 → integers uint8 of that shape, scale and zero point [rows, G] bf16."""
    highest, beta = 2**bits - 1, FIRST_BETA
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    best_scale, best_zero = (side[..., None].float() for side in grid(groups, bits=bits))
    _, error = _rounded(groups, best_scale, best_zero, bits)
    fewest = _loss(error).masked_fill_(_has_outlier(groups), 0.0)
    scale = (greatest / highest - least / highest).clamp_min_(TINY)
    zero = -least / scale
    for _ in range(STEPS):
        held_scale = scale.bfloat16().float()
        held_zero = zero.bfloat16().float() if has_real_zero else zero.round().clamp_(0, highest)
        q, error = _rounded(groups, held_scale, held_zero, bits)
        loss = _loss(error)
        better = loss < fewest
        fewest = torch.where(better, loss, fewest)
        best_scale = torch.where(better, held_scale, best_scale)
        best_zero = torch.where(better, held_zero, best_zero)
        wanted = groups - _shrink(error.div_(held_scale), beta).mul_(held_scale)
        scale, zero = _least_squares(q, wanted, held_scale)
        beta *= BETA_GROWTH
    integers, _ = _rounded(groups, best_scale, best_zero, bits)
    return (
        integers.to(torch.uint8), best_scale[..., 0].bfloat16(), best_zero[..., 0].bfloat16()
    )  # fmt: skip


def _rounded(groups: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The integers, and the errors of the weight that a `GroupWeight` makes of them."""
    middle = 2 ** (bits - 1)
    offset = (middle - zero).mul_(scale).bfloat16().float()
    q = (groups - offset).div_(scale).add_(middle).round_().clamp_(0, 2**bits - 1)
    return q, groups - (q - middle).mul_(scale).add_(offset)


def _loss(error: Tensor) -> Tensor:
    return error.abs().pow_(LOSS_POWER).sum(-1, keepdim=True)


def _has_outlier(groups: Tensor) -> Tensor:
    rms = groups.square().mean(-1, keepdim=True).sqrt_()
    return groups.abs().amax(-1, keepdim=True) > OUTLIER_RMS * rms


def _shrink(error: Tensor, beta: float) -> Tensor:
    size = error.abs()
    return size.sub_(size.clamp_min(TINY).pow_(POWER - 1).div_(beta)).clamp_min_(0).copysign_(error)


def _least_squares(q: Tensor, wanted: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """s and z of the best (q - z) · s for what is wanted; s stays where it would not be positive,
    or all q are equal."""
    q_mean, wanted_mean = q.mean(-1, keepdim=True), wanted.mean(-1, keepdim=True)
    spread = q - q_mean
    variance = spread.square().sum(-1, keepdim=True)
    slope = spread.mul_(wanted - wanted_mean).sum(-1, keepdim=True) / variance.clamp_min_(TINY)
    scale = torch.where(slope > TINY, slope, scale)
    return scale, q_mean - wanted_mean / scale

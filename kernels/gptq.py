"""GPTQ: integers chosen for what a layer puts out, by the inputs that it sees.

For a weight W [N, K] and inputs X [T, K] the integers q are to make ‖X (q̂ - W)ᵀ‖² small, where
q̂ = (q - zero point) · scale. With H = Xᵀ X = L Lᵀ, L lower triangular, and the errors e = q̂ - w of
one row, that is

    ‖e L‖² = Σ_m (e[m] · L[m, m] + Σ_{i > m} e[i] · L[i, m])²

so columns are rounded from the last to the first, each to the grid's nearest value to

    w[m] - (Σ_{i > m} e[i] · L[i, m]) / L[m, m]

which makes its term as small as the grid allows. It is GPTQ (Frantar et al., arXiv 2210.17323) in
the form of Babai's nearest plane (Chen et al., arXiv 2507.18553): the same integers without the
inverse of H, whose second copy would be 13 GB for BLOOM-176B's widest layer. Act-order: columns are
sorted by H[m, m], the greatest last and so rounded first. Groups keep their places, and each its
scale and zero point of before ("static groups"): any reader of groups reads the result.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.groups import Quantized, grid
from tightfit.kernels.weights import SCRATCH_ELEMENTS, check_finite

BLOCK_COLUMNS: Final = 128
"""Columns whose errors reach all others in one matrix product."""

DAMPING: Final = 0.01
"""Of the mean of H's diagonal, added to it; the paper's."""

MAX_DAMPING: Final = 1.0

ERROR_POWER: Final = 2.4
"""Of the loss by which `fit_grid` chooses; as in GPTQ's own code."""

RANGE_SHARES: Final = tuple(1 - i / 40 for i in range(1, 20))
"""Shares of a group's range that `fit_grid` tries, besides the whole."""

ROWS_ELEMENTS: Final = 2**26
"""Weights rounded together, 256 MB in fp32: many rows, for the columns go one by one."""


class HessianError(ValueError):
    """A Hessian has no Cholesky factor: it needs more damping."""


def factor_hessian(
    hessian: Tensor, *, damping: float = DAMPING, act_order: bool = True
) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of a layer's Hessian, in the Hessian's own memory.

    A feature that was always 0 keeps its diagonal's damping only, and thus is rounded to nearest.

    Args:
        hessian: [K, K] fp32 contiguous, Xᵀ X over all calibration tokens, in any unit; overwritten.
        damping: share of the diagonal's mean that is added to it.
        act_order: sort features by their diagonal.
    Returns:
        Lᵀ [K, K], upper triangular, of the sorted features; their order [K] int64.
    Raises:
        HessianError: there is none with this damping.
        ValueError: the Hessian is not finite.
    """
    diagonal = hessian.diagonal()
    mean = float(diagonal.mean())
    if not 0 <= mean < float("inf"):
        raise ValueError(f"inputs are not finite: their mean square is {mean}")
    order = torch.arange(len(diagonal), device=hessian.device)
    if act_order:
        order = torch.argsort(diagonal, stable=True)
        _permute(hessian, order)
    hessian.diagonal().add_(damping * mean if mean > 0 else 1.0)
    info = torch.empty((), dtype=torch.int32, device=hessian.device)
    # H is its own transpose, whose strides are LAPACK's: the factor is computed in its place.
    torch.linalg.cholesky_ex(hessian.mT, out=(hessian.mT, info))
    if int(info):
        raise HessianError(f"with damping {damping:g} the Hessian has no Cholesky factor")
    return hessian, order


def _permute(matrix: Tensor, order: Tensor) -> None:
    """Rows and columns of a square matrix in another order, in place but for a few at a time."""
    step = max(1, SCRATCH_ELEMENTS // max(1, len(order)))
    for side in (matrix, matrix.mT):
        for first in range(0, len(order), step):
            part = side[first : first + step]
            part.copy_(part[:, order])


def fit_grid(
    weight: Tensor, importance: Tensor, *, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Scales and zero points for GPTQ: of narrower and narrower ranges the best for each group.

    What is least is Σ importance · |error|^2.4: more than a square punishes the large errors of
    values that a narrow range cuts off, which no other column could make up for.

    Args:
        weight: [N, K] floating, finite.
        importance: [K] fp32, the Hessian's diagonal.
        bits: of the integers.
        group_size: input features that share a scale, a divisor of K.
    Returns:
        scale [N, G] bf16, positive; zero point [N, G] fp32, whole numbers in [0, 2^bits).
    """
    n_in = weight.shape[1]
    shares = importance.view(-1, group_size)
    step = max(1, SCRATCH_ELEMENTS // max(1, n_in))
    parts = [
        _fit_rows(weight[first : first + step].float().view(-1, *shares.shape), shares, bits)
        for first in range(0, len(weight), step)
    ]
    scales, zero_points = zip(*parts, strict=True)
    return torch.cat(scales), torch.cat(zero_points)


def _fit_rows(groups: Tensor, importance: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """[rows, G, group size] and [G, group size] → scale and zero point [rows, G]."""
    highest = 2**bits - 1
    best_scale, best_zero_point = grid(groups, bits=bits)
    least = _grid_loss(groups, importance, best_scale.float(), best_zero_point, highest)
    for share in RANGE_SHARES:
        scale, zero_point = grid(groups, bits=bits, share=share)
        loss = _grid_loss(groups, importance, scale.float(), zero_point, highest)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale = torch.where(better, scale, best_scale)
        best_zero_point = torch.where(better, zero_point, best_zero_point)
    return best_scale, best_zero_point


def _grid_loss(
    groups: Tensor, importance: Tensor, scale: Tensor, zero_point: Tensor, highest: int
) -> Tensor:
    """Σ importance · |error|^ERROR_POWER of each group, [rows, G]."""
    rounded = (groups / scale[..., None]).round_().add_(zero_point[..., None])
    rounded.clamp_(0, highest).sub_(zero_point[..., None]).mul_(scale[..., None])
    return rounded.sub_(groups).abs_().pow_(ERROR_POWER).mul_(importance).sum(-1)


def gptq(
    weight: Tensor, factor: Tensor, order: Tensor, *, bits: int, scale: Tensor, zero_point: Tensor
) -> Quantized:
    """Round a weight to a given grid for the inputs that the Hessian was made of.

    Args:
        weight: [N, K] floating; not changed.
        factor, order: of the Hessian of its K inputs, from `factor_hessian`.
        bits: of the integers.
        scale: [N, G] positive, of K / G consecutive features each.
        zero_point: [N, G], whole numbers in [0, 2^bits).
    Raises:
        ValueError: the weight has NaN or infinite entries.
    """
    n_out, n_in = weight.shape
    integers = torch.empty((n_out, n_in), dtype=torch.uint8, device=weight.device)
    groups = (order // (n_in // scale.shape[1])).tolist()
    step = max(1, ROWS_ELEMENTS // max(1, n_in))
    for first in range(0, n_out, step):
        rows = slice(first, first + step)
        check_finite(weight[rows], first)
        sorted_integers = _round_rows(
            weight[rows].float().t()[order],
            factor,
            groups,
            scale[rows].float().t().contiguous(),
            zero_point[rows].float().t().contiguous(),
            2**bits - 1,
        )
        integers[rows, order] = sorted_integers.t()
    return Quantized(bits=bits, integers=integers, scale=scale, zero_point=zero_point)


def _round_rows(
    columns: Tensor,
    factor: Tensor,
    groups: list[int],
    scale: Tensor,
    zero_point: Tensor,
    highest: int,
) -> Tensor:
    """Some rows: columns [K, rows] fp32 in the factor's order, overwritten with their errors;
    scale and zero point [G, rows]. Returns the integers [K, rows] uint8."""
    n_in = len(columns)
    integers = torch.empty(columns.shape, dtype=torch.uint8, device=columns.device)
    for end in range(n_in, 0, -BLOCK_COLUMNS):
        first = max(0, end - BLOCK_COLUMNS)
        inside = factor[first:end, first:end] / factor.diagonal()[first:end, None]
        shift = factor[first:end, end:] @ columns[end:]
        shift.div_(factor.diagonal()[first:end, None])
        for i in range(end - first - 1, -1, -1):
            column = columns[first + i]
            group_scale, group_zero = scale[groups[first + i]], zero_point[groups[first + i]]
            wanted = (column - shift[i]).div_(group_scale).round_().add_(group_zero)
            integers[first + i] = wanted.clamp_(0, highest)
            error = wanted.sub_(group_zero).mul_(group_scale).sub_(column)
            column.copy_(error)
            shift[:i].addr_(inside[:i, i], error)
    return integers

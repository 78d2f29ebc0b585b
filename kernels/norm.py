"""LayerNorm and RMSNorm with the addition of the residual before them, in one pass over memory.

    s = x + residual                       rounded to x's dtype, as the next residual is
    LayerNorm:  y = (s - μ) / √(σ² + ε) · weight + bias    μ, σ² mean and variance of a row of s
    RMSNorm:    y = s / √(mean(s²) + ε) · weight + bias    (arXiv 1910.07467)

T tokens, C hidden size. x, residual, s and y [T, C] fp16, bf16 or fp32, weight and bias [C], both
optional. Moments and all that follows are fp32, rounded once, when y is written; the variance is
that of the centred row, not a difference of squares.

One program holds one row in registers: each of x and residual is read once, s and y written once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case

SUPPORTED_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)

MAX_HIDDEN_SIZE: Final = 16_384
"""Of a row that one program holds: 64 KB of fp32 in 1,024 threads."""

SHORT_ROW: Final = 1024
"""Block below which one warp takes a row: the reduction across several would be the longer part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up: a program for each row."""

    block: int
    """Power of two that holds a row."""
    num_warps: int


def choose_tile(hidden_size: int, itemsize: int) -> Tile:
    """By the length of a row alone: rows share nothing but weight and bias, which stay in cache.

    A thread has 64 bytes of each operand in registers at most: with 128 of fp32 ptxas spills on
    some chips.

    Args:
        hidden_size: C.
        itemsize: bytes of a value.
    """
    block = max(32, int(triton.next_power_of_2(hidden_size)))
    if block < SHORT_ROW:
        return Tile(block=block, num_warps=1)
    return Tile(block=block, num_warps=max(4, block * itemsize // (32 * 64)))


@triton.jit  # type: ignore[untyped-decorator]
def _norm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, residual_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr,
    C,
    stride_x, stride_residual,
    eps,
    IS_RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row; sum and y are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < C
    s = tl.load(x_ptr + row * stride_x + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * stride_residual + cols, mask=mask, other=0.0)
        s = (s.to(tl.float32) + residual.to(tl.float32)).to(s.dtype)
        tl.store(sum_ptr + row * C + cols, s, mask=mask)

    y = s.to(tl.float32)
    if not IS_RMS:
        mean = tl.sum(y, axis=0) / C
        y = tl.where(mask, y - mean, 0.0)
    y *= 1.0 / tl.sqrt_rn(tl.sum(y * y, axis=0) / C + eps)
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * C + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor | None]:
    """The norm of x + residual, and that sum; see `reference.add_norm`.

    Args:
        x: [T, C] fp16, bf16 or fp32, C at most 16,384; rows may be a slice of wider ones.
        residual: the same, or None: the norm of x alone.
        weight: [C] of any floating dtype, or None: all ones.
        bias: [C] of any floating dtype, or None.
        eps: added to the variance or the mean square.
        is_rms: RMSNorm, else LayerNorm.
    Returns:
        y and the sum, [T, C] of x's dtype, new and contiguous; None for the sum without a residual.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    x, residual = _rows(x, residual)
    n_tokens, hidden_size = x.shape
    vectors = [_vector(name, t, hidden_size) for name, t in (("weight", weight), ("bias", bias))]
    y = x.new_empty(x.shape)
    total = None if residual is None else torch.empty_like(y)
    if y.numel() == 0:
        return y, total
    tile = choose_tile(hidden_size, x.itemsize)
    # A pointer that is not read stands where one is wanted.
    _norm_kernel[(n_tokens,)](
        x, x if residual is None else residual,
        *(x if vector is None else vector for vector in vectors),
        y if total is None else total, y,
        hidden_size,
        x.stride(0), 0 if residual is None else residual.stride(0),
        eps,
        IS_RMS=is_rms, HAS_RESIDUAL=residual is not None,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCK=tile.block,
        num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, total


def _rows(x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both with rows that the kernel can read."""
    if x.ndim != 2 or x.shape[1] > MAX_HIDDEN_SIZE or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"x must be [T, C ≤ {MAX_HIDDEN_SIZE}] in one of {SUPPORTED_DTYPES}, got "
            f"{list(x.shape)} {x.dtype}"
        )
    if residual is not None and (residual.shape != x.shape or residual.dtype is not x.dtype):
        raise ValueError(
            f"residual must be {list(x.shape)} {x.dtype} as x is, got {list(residual.shape)} "
            f"{residual.dtype}"
        )
    return _with_dense_rows(x), None if residual is None else _with_dense_rows(residual)


def _with_dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _vector(name: str, vector: Tensor | None, hidden_size: int) -> Tensor | None:
    if vector is None:
        return None
    if vector.shape != (hidden_size,) or not vector.is_floating_point():
        raise ValueError(
            f"{name} must be [{hidden_size}] floating, got {list(vector.shape)} {vector.dtype}"
        )
    return vector.contiguous()


HIDDEN_SIZES: Final = {"bloom-176b": 14_336, "opt-175b": 12_288, "llama": 8_192, "small": 768}
"""Of real models; tiles are shared by those between the same powers of two."""

ITEMSIZES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}


def compile_cases() -> list[Case]:
    """What real layers launch, all norms with weight, LayerNorm with a bias too: with a residual in
    16 bits at every size, and of the rest one size each."""
    both = (False, True)
    return [
        *[
            _case(size, dtype, is_rms=is_rms, has_residual=True)
            for size in HIDDEN_SIZES
            for dtype in ("fp16", "bf16")
            for is_rms in both
        ],
        *[_case("bloom-176b", "bf16", is_rms=is_rms, has_residual=False) for is_rms in both],
        *[_case("small", "fp32", is_rms=is_rms, has_residual=True) for is_rms in both],
    ]


def _case(size: str, dtype: str, *, is_rms: bool, has_residual: bool) -> Case:
    tile = choose_tile(HIDDEN_SIZES[size], ITEMSIZES[dtype])
    pointers = ("x_ptr", "residual_ptr", "weight_ptr", "bias_ptr", "sum_ptr", "y_ptr")
    integers = ("C", "stride_x", "stride_residual")
    constants: dict[str, Any] = {
        "IS_RMS": is_rms, "HAS_RESIDUAL": has_residual, "HAS_WEIGHT": True, "HAS_BIAS": not is_rms,
        "BLOCK": tile.block,
    }  # fmt: skip
    kind, residual = "rms" if is_rms else "layer", " residual" if has_residual else ""
    return Case(
        name=f"norm {kind} {size} {dtype}{residual}",
        kernel=_norm_kernel,
        types={
            **dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(integers, "i32"), "eps": "fp32",
        },
        constants=constants,
        num_warps=tile.num_warps,
        has_dot=False,
        capabilities=CAPABILITIES if dtype == "bf16" else (*OLD_CAPABILITIES, *CAPABILITIES),
    )  # fmt: skip

"""LLM.int8() on a GPU (arXiv 2208.07339): outlier columns in 16 bit, the rest in int8 × int8.

    O = {k : any t has |x[t, k]| ≥ 6}, or another threshold
    sx[t] = max_{k ∉ O} |x[t, k]| / 127, 1 for a row of zeros
    x8[t, k] = round(x[t, k] / sx[t]), half to even; 0 for k ∈ O
    y[t, n] = (Σ_k x8[t, k] · w8[n, k] · sx[t] + Σ_{k ∈ O} x[t, k] · w8[n, k]) · sw[n] + bias[n]

T tokens, N output features, K input features. x [T, K] fp16 or bf16; w8 [N, K] int8; sw [N] bf16;
bias [N] in x's dtype; y in x's dtype. The first sum is int32 and exact, for K up to 2^31 / 127^2 =
133,144; the second is fp32, of factors in x's dtype, in which every int8 is exact.

Four kernels, and nothing that the host waits for: the columns' flags; the outliers' indices and
their count; the rows' int8 and scales; and the product, whose epilogue takes as many outliers as
the count in memory says, 16 at a time: each program reads 3 bytes more for an outlier column of its
block than for another, so that with all columns outliers it is a 16-bit product whose loads are
gathered. A NaN makes its column an outlier too, so that it reaches all of its own row, as it would
through torch, and no other one.

For many tokens: for few, `w8a16` is faster, and exact in x. Before capability 8.0 Triton has no
int8 × int8, and `llm_int8_linear` is `w8a16_linear` there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import Case
from tightfit.kernels.formats import OUTLIER_THRESHOLD
from tightfit.kernels.w8a16 import (
    GROUP_T,
    SUPPORTED_DTYPES,
    check_inputs,
    has_tensor_cores,
    load_scale,
    tile_of_program,
    w8a16_linear,
)
from tightfit.kernels.weights import INT8_MAX, Int8Weight

MAX_IN: Final = (2**31 - 1) // INT8_MAX**2
"""Input features whose products surely fit an int32 together."""

OUTLIER_BLOCK: Final = 16
"""Outlier columns of one 16-bit product, the least that tensor cores take."""

ROUND: Final = 1.5 * 2**23
"""Added to and subtracted from an fp32 below 2^22 in size it rounds half to even: what is left
fits 24 bits exactly."""

FLAG_BLOCK: Final = (32, 128)
"""Tokens and columns of one step of `_flag_kernel`."""
COMPACT_BLOCK_K: Final = 4096
QUANTIZE_BLOCK_K: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch of the product is cut up."""

    block_t: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""


def choose_tile(n_tokens: int) -> Tile:
    """By the number of tokens."""
    if n_tokens <= 32:
        return Tile(block_t=32, block_n=64, block_k=128, num_warps=4, num_stages=4)
    if n_tokens <= 64:
        return Tile(block_t=64, block_n=64, block_k=128, num_warps=4, num_stages=4)
    return Tile(block_t=128, block_n=128, block_k=128, num_warps=8, num_stages=3)


@triton.jit  # type: ignore[untyped-decorator]
def _flag_kernel(  # type: ignore[no-untyped-def]
    x_ptr, flags_ptr,
    T, K,
    stride_xt,
    THRESHOLD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """flags [K] int8: 1 where any |x| of the column reaches the threshold, or is no number."""
    cols = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_row = (cols < K)[None, :]
    flags = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)
    for first in range(0, T, BLOCK_T):
        tokens = first + tl.arange(0, BLOCK_T)
        x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt + cols[None, :]
        x = tl.load(x_ptrs, mask=(tokens < T)[:, None] & in_row, other=0.0).to(tl.float32)
        flags |= tl.where(tl.abs(x) < THRESHOLD, 0, 1)
    tl.store(flags_ptr + cols, tl.max(flags, axis=0).to(tl.int8), mask=cols < K)


@triton.jit  # type: ignore[untyped-decorator]
def _compact_kernel(  # type: ignore[no-untyped-def]
    flags_ptr, indices_ptr, count_ptr,
    K,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """indices [K] int32: the flagged columns in order, and then anything; count [1] int32.

    One program: the indices' places are a running sum over the columns.
    """
    count = tl.zeros((), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        flags = tl.load(flags_ptr + cols, mask=cols < K, other=0).to(tl.int32)
        places = count + tl.cumsum(flags, axis=0) - flags
        tl.store(indices_ptr + places, cols, mask=flags != 0)
        count += tl.sum(flags, axis=0)
    tl.store(count_ptr, count)


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x_ptr, flags_ptr, x8_ptr, scale_ptr,
    K,
    stride_xt,
    LEVELS: tl.constexpr, ROUND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of each program: x8 [T, K] int8, 0 in flagged columns, and scale [T] fp32.

    The row is read twice, the second time from cache.
    """
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * stride_xt
    x8_ptr += token * K
    greatest = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        is_outlier = tl.load(flags_ptr + cols, mask=cols < K, other=1) != 0
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, tl.where(is_outlier, 0.0, tl.abs(x)))
    # Exactly rounded divisions, as torch's: `/` compiles to an approximate one.
    scale = tl.div_rn(tl.max(greatest, axis=0), LEVELS * 1.0)
    scale = tl.where(scale == 0.0, 1.0, scale)
    tl.store(scale_ptr + token, scale)
    for first in range(0, K, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        is_outlier = tl.load(flags_ptr + cols, mask=cols < K, other=1) != 0
        x = tl.load(x_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        steps = tl.div_rn(tl.where(is_outlier, 0.0, x), tl.broadcast_to(scale, (BLOCK_K,)))
        x8 = (steps + ROUND) - ROUND
        tl.store(x8_ptr + cols, x8.to(tl.int8), mask=cols < K)


@triton.jit  # type: ignore[untyped-decorator]
def _gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, x8_ptr, scale_x_ptr, indices_ptr, count_ptr, values_ptr, scale_ptr, bias_ptr, y_ptr,
    T, N, K,
    stride_xt,
    HAS_BIAS: tl.constexpr, OUTLIER_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """y [T, N]; both operands of the int32 product are contiguous along K."""
    block_t, block_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    tokens = tl.minimum(offs_t, T - 1)
    x8_ptrs = x8_ptr + tokens.to(tl.int64)[:, None] * K
    row_ptrs = values_ptr + rows.to(tl.int64)[:, None] * K

    dot = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.int32)
    for first in range(0, K, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        mask = cols[None, :] < K
        x8 = tl.load(x8_ptrs + cols[None, :], mask=mask, other=0)
        values = tl.load(row_ptrs + cols[None, :], mask=mask, other=0)
        dot = tl.dot(x8, tl.trans(values), dot, out_dtype=tl.int32)
    acc = dot.to(tl.float32) * tl.load(scale_x_ptr + tokens)[:, None]

    # Not pipelined: outliers are few, and stages would take shared memory from the loop above.
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_xt
    count = tl.load(count_ptr)
    for first in tl.range(0, count, OUTLIER_BLOCK, num_stages=1):
        places = first + tl.arange(0, OUTLIER_BLOCK)
        cols = tl.load(indices_ptr + places, mask=places < count, other=0)
        mask = (places < count)[None, :]
        x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0)
        values = tl.load(row_ptrs + cols[None, :], mask=mask, other=0)
        acc = tl.dot(x, tl.trans(values.to(x.dtype)), acc)

    acc *= load_scale(scale_ptr, rows)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    y_ptrs = y_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(
        y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_n < N)[None, :]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedInput:
    """x [T, K], split as the module's text says."""

    values: Tensor
    """x8 [T, K] int8, contiguous, 0 in outlier columns."""
    scale: Tensor
    """sx [T] fp32."""
    outliers: Tensor
    """[K] int32: the outlier columns in ascending order, and then anything."""
    num_outliers: Tensor
    """[1] int32, on the device: how many."""


def quantize_input(x: Tensor, threshold: float = OUTLIER_THRESHOLD) -> QuantizedInput:
    """Split and quantise x; see `reference.quantize_input`.

    Args:
        x: [T, K] fp16 or bf16; rows may be a slice of wider ones.
        threshold: |x| from which a column is an outlier.
    Raises:
        ValueError: of another shape or dtype, or empty.
    """
    if x.ndim != 2 or x.dtype not in SUPPORTED_DTYPES or x.numel() == 0:
        raise ValueError(
            f"x must be [T, K] in one of {SUPPORTED_DTYPES} and not empty, got {list(x.shape)} "
            f"{x.dtype}"
        )
    x = x if x.stride(1) == 1 else x.contiguous()
    n_tokens, n_in = x.shape
    flags = x.new_empty(n_in, dtype=torch.int8)
    split = QuantizedInput(
        values=x.new_empty((n_tokens, n_in), dtype=torch.int8),
        scale=x.new_empty(n_tokens, dtype=torch.float32),
        outliers=x.new_empty(n_in, dtype=torch.int32),
        num_outliers=x.new_empty(1, dtype=torch.int32),
    )
    block_t, block_k = FLAG_BLOCK
    _flag_kernel[(triton.cdiv(n_in, block_k),)](
        x, flags, n_tokens, n_in, x.stride(0),
        THRESHOLD=threshold, BLOCK_T=block_t, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    _compact_kernel[(1,)](
        flags, split.outliers, split.num_outliers, n_in,
        BLOCK_K=COMPACT_BLOCK_K,
        num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    _quantize_kernel[(n_tokens,)](
        x, flags, split.values, split.scale, n_in, x.stride(0),
        LEVELS=INT8_MAX, ROUND=ROUND, BLOCK_K=QUANTIZE_BLOCK_K,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return split


def llm_int8_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, capability: int | None = None
) -> Tensor:
    """LLM.int8(); see `reference.llm_int8_linear`.

    Args:
        x: [T, K] fp16 or bf16; rows may be a slice of wider ones.
        weight: values [N, K] contiguous, on x's device.
        bias: [N], of any floating dtype, or None.
        capability: of x's device × 10; asked of torch if None. Below 80 it is `w8a16_linear`.
    Returns:
        [T, N], contiguous, dtype of x. The same input gives the same bits.
    Raises:
        ValueError: shapes or dtypes do not fit, or K is above `MAX_IN`.
    """
    x, bias = check_inputs(x, weight, bias)
    n_tokens, n_in = x.shape
    n_out = weight.values.shape[0]
    if n_in > MAX_IN:
        raise ValueError(f"K must be at most {MAX_IN} for sums in int32, got {n_in}")
    if x.numel() == 0 or n_out == 0 or not has_tensor_cores(x.device, capability):
        return w8a16_linear(x, weight, bias, capability=capability)
    split = quantize_input(x, weight.outlier_threshold)
    tile = choose_tile(n_tokens)
    y = x.new_empty((n_tokens, n_out))
    scale = weight.scale.view(torch.int16)
    _gemm_kernel[(triton.cdiv(n_tokens, tile.block_t) * triton.cdiv(n_out, tile.block_n),)](
        x, split.values, split.scale, split.outliers, split.num_outliers,
        weight.values, scale, scale if bias is None else bias, y,
        n_tokens, n_out, n_in, x.stride(0),
        HAS_BIAS=bias is not None, OUTLIER_BLOCK=OUTLIER_BLOCK,
        BLOCK_T=tile.block_t, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_T=GROUP_T,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


TOKEN_COUNTS: Final = (32, 64, 512)
"""One of each tile."""


def compile_cases() -> list[Case]:
    """Every variant that real layers launch, once."""
    return [
        *[case for dtype in ("fp16", "bf16") for case in _split_cases(dtype)],
        *[case for dtype in ("fp16", "bf16") for case in _gemm_cases(dtype)],
        Case(
            name="llm_int8 compact",
            kernel=_compact_kernel,
            types={"flags_ptr": "*i8", "indices_ptr": "*i32", "count_ptr": "*i32", "K": "i32"},
            constants={"BLOCK_K": COMPACT_BLOCK_K},
            num_warps=8,
            has_dot=False,
        ),
    ]


def _split_cases(dtype: str) -> Iterator[Case]:
    block_t, block_k = FLAG_BLOCK
    yield Case(
        name=f"llm_int8 flag {dtype}",
        kernel=_flag_kernel,
        types={
            "x_ptr": f"*{dtype}", "flags_ptr": "*i8", "T": "i32", "K": "i32", "stride_xt": "i32",
        },
        constants={"THRESHOLD": OUTLIER_THRESHOLD, "BLOCK_T": block_t, "BLOCK_K": block_k},
        unaligned=frozenset({"T"}),
        has_dot=False,
    )  # fmt: skip
    yield Case(
        name=f"llm_int8 quantize {dtype}",
        kernel=_quantize_kernel,
        types={
            "x_ptr": f"*{dtype}", "flags_ptr": "*i8", "x8_ptr": "*i8", "scale_ptr": "*fp32",
            "K": "i32", "stride_xt": "i32",
        },
        constants={"LEVELS": INT8_MAX, "ROUND": ROUND, "BLOCK_K": QUANTIZE_BLOCK_K},
        has_dot=False,
    )  # fmt: skip


def _gemm_cases(dtype: str) -> Iterator[Case]:
    for n_tokens in TOKEN_COUNTS:
        for has_bias in (False, True):
            tile = choose_tile(n_tokens)
            yield Case(
                name=f"llm_int8 T={n_tokens} {dtype}{' bias' if has_bias else ''}",
                kernel=_gemm_kernel,
                types={
                    "x_ptr": f"*{dtype}", "x8_ptr": "*i8", "scale_x_ptr": "*fp32",
                    "indices_ptr": "*i32", "count_ptr": "*i32", "values_ptr": "*i8",
                    "scale_ptr": "*i16", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}",
                    "T": "i32", "N": "i32", "K": "i32", "stride_xt": "i32",
                },
                constants={
                    "HAS_BIAS": has_bias, "OUTLIER_BLOCK": OUTLIER_BLOCK,
                    "BLOCK_T": tile.block_t, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                    "GROUP_T": GROUP_T,
                },
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                unaligned=frozenset({"T"}),
            )  # fmt: skip

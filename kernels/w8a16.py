"""Weight-only int8 on a GPU: the weight is read once, as bytes, and widened in registers.

    y[t, n] = (Σ_k x[t, k] · values[n, k]) · scale[n] + bias[n]

T tokens, N output features, K input features. x [T, K] fp16 or bf16, in which every int8 is exact;
values [N, K] int8; scale [N] bf16; bias [N] in x's dtype; y in x's dtype. Sums are fp32, and the
scale is applied to the sum: one rounding less than dequantising first.

- 1 token: sums without tensor cores, as the weight's bytes are the bound.
- More: tensor cores. Up to 16 tokens x · valuesᵀ, by instructions of 16 rows on every chip. Above,
  (values · xᵀ)ᵀ: a Hopper's instructions take the left operand from registers, where the weight
  was widened, and would want the right one back in shared memory.
- Where one sweep over N leaves processors idle, K is split as well: each part's sums go to a
  workspace [splits, T, N] fp32, and a second kernel adds them in a fixed order, so that the same
  input gives the same bits.
- Before capability 8.0 there are no tensor cores in Triton: a few tokens are taken one by one, and
  for more a block of rows is dequantised at a time and multiplied by cuBLAS.

Kernels read bf16 scales as their 16 bits: neither old capabilities nor the interpreter know bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case, Chip, by_chip, chip_of
from tightfit.kernels.weights import Int8Weight

SUPPORTED_DTYPES: Final = (torch.float16, torch.bfloat16)

TENSOR_CORE_CAPABILITY: Final = 80
"""Capability × 10 from which Triton has tensor cores."""

MAX_TOKENS_ONE_BY_ONE: Final = 4
"""Without tensor cores: above it, dequantising (1 byte read, 2 written, 2 read) moves less than
reading the weight again for each token."""

DEQUANTIZE_ELEMENTS: Final = 2**26
"""Of weights dequantised at a time: 128 MB, for the head alone would be 7 GB."""

CUBLAS_ROWS: Final = 256
"""Rows of a weight that are multiplied at once are a multiple."""

MAX_ROWS_LEFT: Final = 16
"""Tokens of a program up to which x is the left operand."""

MIN_PROGRAMS: Final = {"gemv": 4096, "gemm": 512}
"""Programs from which on K is not split: some for every processor of the largest chips. On an H100
splits cost more than they bring where there are so many."""

MIN_STEPS_PER_SPLIT: Final = 4
"""Steps of the loop over K that a split has at least, to hide its start."""

REDUCE_BLOCK_N: Final = 512
DEQUANTIZE_BLOCK: Final = (8, 512)
"""Rows and columns of one program of `_dequantize_kernel`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up."""

    block_t: int
    """Tokens of a program; 1 is the kernel without tensor cores."""
    block_n: int
    block_k: int
    splits: int
    """Parts of K that are summed apart."""
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""

    def k_per_split(self, n_in: int) -> int:
        """Input features of a split, a multiple of block_k."""
        return int(triton.cdiv(triton.cdiv(n_in, self.block_k), self.splits)) * self.block_k


def choose_tile(n_tokens: int, n_out: int, n_in: int, *, chip: Chip = Chip.LARGE) -> Tile:
    """By the number of tokens; the splits also by the weight's shape. The fastest of those tried on
    an H100.

    Args:
        chip: that it is for.
    """
    if n_tokens == 1:
        # Rows of 1 KB each, as on an H100 half of the bandwidth is lost with 512 bytes.
        block_t, block_n, block_k, num_warps, num_stages = 1, 2, 1024, 1, 1
    elif n_tokens <= 32:
        block_t, block_k = (16, 256) if n_tokens <= 16 else (32, 128)
        block_n, num_warps, num_stages = 64, 4, 3
    elif n_tokens <= 64:
        block_t, block_n, block_k, num_warps, num_stages = 64, 128, 128, 8, 3
        num_stages = 2 if chip is Chip.SMALL else 3
    else:
        block_t, block_n, num_warps, num_stages = 128, 128, 8, 3
        block_k = 64 if chip is Chip.SMALL else 128
    splits = 1
    if n_tokens <= 64:
        wanted = MIN_PROGRAMS["gemv" if n_tokens == 1 else "gemm"] // triton.cdiv(n_out, block_n)
        steps = triton.cdiv(n_in, block_k)
        splits = max(1, min(wanted, steps // MIN_STEPS_PER_SPLIT))
        splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    return Tile(
        block_t=block_t,
        block_n=block_n,
        block_k=block_k,
        splits=splits,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit
def load_scale(scale_ptr, rows):  # type: ignore[no-untyped-def]
    """The bf16 whose bits lie at `scale_ptr` (int16), in fp32."""
    return (tl.load(scale_ptr + rows).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, values_ptr, scale_ptr, bias_ptr, out_ptr,
    T, N, K, k_per_split,
    stride_xt,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token of each program, so that of few tokens those with the same rows of the weight run
    together. out is y [T, N], or the workspace [splits, T, N]."""
    token = (tl.program_id(0) % T).to(tl.int64)
    offs_n = tl.program_id(0) // T * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    row_ptrs = values_ptr + rows.to(tl.int64)[:, None] * K
    x_ptr += token * stride_xt
    first = tl.program_id(1) * k_per_split
    end = tl.minimum(first + k_per_split, K)

    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in range(first, end, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = cols < end
        x = tl.load(x_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        values = tl.load(row_ptrs + cols[None, :], mask=mask[None, :], other=0)
        acc += values.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    else:
        y *= load_scale(scale_ptr, rows)
        if HAS_BIAS:
            y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit  # type: ignore[untyped-decorator]
def tile_of_program(  # type: ignore[no-untyped-def]
    T, N, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr
):  # fmt: skip
    """Of the program's first axis: its block of tokens and its block of rows.

    The tokens' blocks go fastest, GROUP_T of them, so that programs that run at once share a block
    of the weight, and all of them few blocks of x.
    """
    program = tl.program_id(0)
    num_t, num_n = tl.cdiv(T, BLOCK_T), tl.cdiv(N, BLOCK_N)
    first_t = program // (GROUP_T * num_n) * GROUP_T
    size = tl.minimum(num_t - first_t, GROUP_T)
    inside = program % (GROUP_T * num_n)
    return first_t + inside % size, inside // size


@triton.jit  # type: ignore[untyped-decorator]
def _gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, values_ptr, scale_ptr, bias_ptr, out_ptr,
    T, N, K, k_per_split,
    stride_xt,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, WEIGHT_LEFT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """out is y [T, N], or the workspace [splits, T, N]."""
    block_t, block_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    tokens = tl.minimum(offs_t, T - 1).to(tl.int64)
    x_ptrs = x_ptr + tokens[:, None] * stride_xt
    row_ptrs = values_ptr + rows.to(tl.int64)[:, None] * K
    first = tl.program_id(1) * k_per_split
    end = tl.minimum(first + k_per_split, K)

    if WEIGHT_LEFT:
        acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_T, BLOCK_N), dtype=tl.float32)
    for k in range(first, end, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        mask = cols[None, :] < end
        x = tl.load(x_ptrs + cols[None, :], mask=mask, other=0.0)
        values = tl.load(row_ptrs + cols[None, :], mask=mask, other=0)
        if WEIGHT_LEFT:
            acc = tl.dot(values.to(x.dtype), tl.trans(x), acc)
        else:
            acc = tl.dot(x, tl.trans(values.to(x.dtype)), acc)
    if WEIGHT_LEFT:
        acc = tl.trans(acc)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    else:
        acc *= load_scale(scale_ptr, rows)[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_t < T)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, scale_ptr, bias_ptr, y_ptr,
    N, size, splits,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [T, N] of the sums [splits, T, N], added from the first to the last; size is T · N."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)
    offsets, mask = token * N + offs_n, offs_n < N
    sums_ptrs = sums_ptr + offsets
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(splits):
        y += tl.load(sums_ptrs, mask=mask, other=0.0)
        sums_ptrs += size
    y *= load_scale(scale_ptr, rows)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    values_ptr, scale_ptr, out_ptr,
    N, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [N, K] = values · scale."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_n, N - 1)
    offsets = offs_n.to(tl.int64)[:, None] * K + cols[None, :]
    mask = (offs_n < N)[:, None] & (cols < K)[None, :]
    values = tl.load(values_ptr + offsets, mask=mask, other=0).to(tl.float32)
    weight = values * load_scale(scale_ptr, rows)[:, None]
    tl.store(out_ptr + offsets, weight.to(out_ptr.dtype.element_ty), mask=mask)


GROUP_T: Final = 8
"""Blocks of tokens among which a block of the weight is shared."""


def w8a16_linear(
    x: Tensor, weight: Int8Weight, bias: Tensor | None = None, *, capability: int | None = None
) -> Tensor:
    """Weight-only int8; see `reference.int8_linear`.

    Args:
        x: [T, K] fp16 or bf16; rows may be a slice of wider ones.
        weight: values [N, K] contiguous, on x's device.
        bias: [N], of any floating dtype, or None.
        capability: of x's device × 10; asked of torch if None.
    Returns:
        [T, N], contiguous, dtype of x. The same input gives the same bits.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    x, bias = check_inputs(x, weight, bias)
    n_tokens, n_in = x.shape
    n_out = weight.values.shape[0]
    if x.numel() == 0 or n_out == 0:
        y = x.new_zeros((n_tokens, n_out))
        return y if bias is None else y + bias
    if not has_tensor_cores(x.device, capability) and n_tokens > 1:
        if n_tokens > MAX_TOKENS_ONE_BY_ONE:
            return dequantized_linear(x, weight, bias)
        return _launch(x, weight, bias, choose_tile(1, n_out, n_in))
    chip = chip_of(capability_of(x.device, capability))
    return _launch(x, weight, bias, choose_tile(n_tokens, n_out, n_in, chip=chip))


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight that the integers stand for, [N, K] of `dtype` (fp16 or bf16).

    Args:
        values: [N, K] int8, contiguous.
        scale: [N] bf16, contiguous.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_weight(values, scale)
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {SUPPORTED_DTYPES}, got {dtype}")
    out = torch.empty_like(values, dtype=dtype)
    if out.numel() == 0:
        return out
    n_out, n_in = values.shape
    block_n, block_k = DEQUANTIZE_BLOCK
    _dequantize_kernel[(triton.cdiv(n_out, block_n), triton.cdiv(n_in, block_k))](
        values, scale.view(torch.int16), out, n_out, n_in,
        BLOCK_N=block_n, BLOCK_K=block_k,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def has_tensor_cores(device: torch.device, capability: int | None = None) -> bool:
    """Triton has tensor cores there; it is asked of torch unless the capability × 10 is given."""
    return capability_of(device, capability) >= TENSOR_CORE_CAPABILITY


def capability_of(device: torch.device, capability: int | None) -> int:
    """A device's × 10, unless it is given."""
    if capability is not None:
        return capability
    return _ask_capability(device)


@cache
def _ask_capability(device: torch.device) -> int:
    """Once of each device: every launch wants to know."""
    if device.type != "cuda":
        return CAPABILITIES[0]  # the interpreter
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check_inputs(
    x: Tensor, weight: Int8Weight, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x with rows that kernels can read, and the bias in x's dtype.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check_weight(weight.values, weight.scale)
    n_out, n_in = weight.values.shape
    if x.ndim != 2 or x.shape[1] != n_in or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"x must be [T, {n_in}] in one of {SUPPORTED_DTYPES} for a weight [{n_out}, {n_in}], "
            f"got {list(x.shape)} {x.dtype}"
        )
    if bias is not None:
        if bias.shape != (n_out,):
            raise ValueError(f"bias must be [{n_out}], got {list(bias.shape)}")
        bias = bias.to(x.dtype).contiguous()
    return (x if n_in == 0 or x.stride(1) == 1 else x.contiguous()), bias


def _check_weight(values: Tensor, scale: Tensor) -> None:
    if values.ndim != 2 or values.dtype is not torch.int8 or not values.is_contiguous():
        raise ValueError(
            f"values must be [N, K] int8 and contiguous, got {list(values.shape)} {values.dtype} "
            f"with strides {list(values.stride())}"
        )
    n_out = values.shape[0]
    if scale.shape != (n_out,) or scale.dtype is not torch.bfloat16 or not scale.is_contiguous():
        raise ValueError(
            f"scale must be [{n_out}] bfloat16 and contiguous, got {list(scale.shape)} "
            f"{scale.dtype}"
        )


def _launch(x: Tensor, weight: Int8Weight, bias: Tensor | None, tile: Tile) -> Tensor:
    n_tokens, n_in = x.shape
    n_out = weight.values.shape[0]
    y = x.new_empty((n_tokens, n_out))
    scale = weight.scale.view(torch.int16)
    is_split = tile.splits > 1
    out = x.new_empty((tile.splits, *y.shape), dtype=torch.float32) if is_split else y
    blocks_n = triton.cdiv(n_out, tile.block_n)
    kernel = _gemv_kernel if tile.block_t == 1 else _gemm_kernel
    kernel[(triton.cdiv(n_tokens, tile.block_t) * blocks_n, tile.splits)](
        x, weight.values, scale, scale if bias is None else bias, out,
        n_tokens, n_out, n_in, tile.k_per_split(n_in),
        x.stride(0),
        **_constants(tile, has_bias=bias is not None),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if is_split:
        _reduce_kernel[(n_tokens, triton.cdiv(n_out, REDUCE_BLOCK_N))](
            out, scale, scale if bias is None else bias, y,
            n_out, y.numel(), tile.splits,
            HAS_BIAS=bias is not None, BLOCK_N=REDUCE_BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _constants(tile: Tile, *, has_bias: bool) -> dict[str, Any]:
    """The `tl.constexpr` arguments of the kernel that multiplies."""
    is_split = tile.splits > 1
    constants = {
        "HAS_BIAS": has_bias and not is_split, "IS_SPLIT": is_split,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    return constants if tile.block_t == 1 else constants | {
        "BLOCK_T": tile.block_t, "GROUP_T": GROUP_T, "WEIGHT_LEFT": tile.block_t > MAX_ROWS_LEFT,
    }  # fmt: skip


def dequantized_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """A block of rows at a time, multiplied by cuBLAS: for many tokens. See `w8a16_linear`."""
    n_out, n_in = weight.values.shape
    # Whole tiles of cuBLAS: at odd numbers of rows it is several times slower.
    step = max(1, DEQUANTIZE_ELEMENTS // n_in // CUBLAS_ROWS) * CUBLAS_ROWS
    y = x.new_empty((x.shape[0], n_out))
    for first in range(0, n_out, step):
        rows = slice(first, first + step)
        y[:, rows] = x @ dequantize(weight.values[rows], weight.scale[rows], x.dtype).T
    return y if bias is None else y.add_(bias)


WEIGHT_SHAPES: Final = (
    (43_008, 14_336), (14_336, 14_336), (57_344, 14_336), (14_336, 57_344),  # BLOOM-176B
    (250_880, 14_336),
    (12_288, 12_288), (49_152, 12_288), (12_288, 49_152), (50_272, 12_288),  # OPT-175B
    (1_024, 8_192), (8_192, 8_192), (28_672, 8_192), (8_192, 28_672),  # Llama-like, 8 key heads
)  # fmt: skip
"""(N, K) of real layers."""

TOKEN_COUNTS: Final = (1, 16, 32, 64, 512)
"""One of each tile."""


def compile_cases() -> list[Case]:
    """Every variant that real layers launch, once."""
    cases = [case for name in ("fp16", "bf16") for case in _cases(name)]
    return list({case.name: case for case in cases}.values())


def _cases(dtype: str) -> Iterator[Case]:
    pointers = {
        "x_ptr": f"*{dtype}", "values_ptr": "*i8", "scale_ptr": "*i16", "bias_ptr": f"*{dtype}",
    }  # fmt: skip
    capabilities = (*OLD_CAPABILITIES, *CAPABILITIES) if dtype == "fp16" else CAPABILITIES
    yield Case(
        name=f"w8a16 dequantize {dtype}",
        kernel=_dequantize_kernel,
        types={
            "values_ptr": "*i8", "scale_ptr": "*i16", "out_ptr": f"*{dtype}", "N": "i32",
            "K": "i32",
        },
        constants={"BLOCK_N": DEQUANTIZE_BLOCK[0], "BLOCK_K": DEQUANTIZE_BLOCK[1]},
        has_dot=False,
        capabilities=capabilities,
    )  # fmt: skip
    for has_bias in (False, True):
        bias = " bias" if has_bias else ""
        yield Case(
            name=f"w8a16 reduce {dtype}{bias}",
            kernel=_reduce_kernel,
            types={
                "sums_ptr": "*fp32", "scale_ptr": "*i16", "bias_ptr": f"*{dtype}",
                "y_ptr": f"*{dtype}", "N": "i32", "size": "i32", "splits": "i32",
            },
            constants={"HAS_BIAS": has_bias, "BLOCK_N": REDUCE_BLOCK_N},
            unaligned=frozenset({"splits"}),
            has_dot=False,
            capabilities=capabilities,
        )  # fmt: skip
        for n_tokens, (n_out, n_in) in product(TOKEN_COUNTS, WEIGHT_SHAPES):
            for tile, mark, chips in by_chip(partial(_tile_for, n_tokens, n_out, n_in)):
                constants = _constants(tile, has_bias=has_bias)
                out = "*fp32" if constants["IS_SPLIT"] else f"*{dtype}"
                split = " split" if constants["IS_SPLIT"] else ""
                is_gemv = tile.block_t == 1
                yield Case(
                    name=f"w8a16 T={n_tokens}{mark} {dtype}{split or bias}",
                    kernel=_gemv_kernel if is_gemv else _gemm_kernel,
                    types=pointers | {
                        "out_ptr": out, "T": "i32", "N": "i32", "K": "i32", "k_per_split": "i32",
                        "stride_xt": "i32",
                    },
                    constants=constants,
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    unaligned=frozenset({"T"}),
                    has_dot=not is_gemv,
                    capabilities=capabilities if is_gemv else chips,
                )  # fmt: skip


def _tile_for(n_tokens: int, n_out: int, n_in: int, chip: Chip) -> Tile:
    return choose_tile(n_tokens, n_out, n_in, chip=chip)

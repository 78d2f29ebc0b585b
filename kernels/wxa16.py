"""Weight-only int4 and int3 on a GPU: `w4a16` and `w3a16`. Weights are read once, packed.

    y[t, n] = Σ_k x[t, k] · ((q[n, k] - m) · scale[n, g] + zero[n, g]) + bias[n],   m = 2^(bits - 1)

T tokens, N output features, K input features, g the group of k. x [T, K] fp16 or bf16; q packed as
`Layout.TILES` of `groups.py`; scale and zero bf16; bias [N] in x's dtype; y in x's dtype; sums are
fp32.

A tile is what 64 rows and 128 (4 bits) or 256 (3 bits) input features take, in one piece, so that a
program reads memory in a row however the weight is cut up. A column of a tile holds the integers of
four features that lie 32 apart: a shift and a mask give 32 neighbours of each row at once, and
nothing is shuffled among threads.

- Tensor cores take the weight as left operand, widened to x's dtype in registers: for one token as
  well, as widening without them takes more instructions than memory leaves time for. Two or four
  integers are widened at once: their bits are put into the mantissa of 1024 (of 128 in bf16), and
  that number is subtracted.
- Where one sweep over N leaves processors idle, K is split as well, as in `w8a16`: the partial sums
  are added in a fixed order, so that the same input gives the same bits.
- Before capability 8.0 there are no tensor cores in Triton: a few tokens are taken one by one, and
  for more a block of rows is dequantised at a time and multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case, Chip, by_chip, chip_of
from tightfit.kernels.formats import TILE_FEATURES, TILE_PIECE, TILE_ROWS
from tightfit.kernels.groups import GroupWeight
from tightfit.kernels.packing import Layout
from tightfit.kernels.w8a16 import (
    DEQUANTIZE_ELEMENTS,
    GROUP_T,
    MAX_TOKENS_ONE_BY_ONE,
    SUPPORTED_DTYPES,
    capability_of,
    has_tensor_cores,
    tile_of_program,
)
from tightfit.kernels.widen import field, fields

SUPPORTED_BITS: Final = (4, 3)
BLOCK: Final = 4 * TILE_PIECE
"""Input features of a tile's 32 columns; with 3 bits a tile has two such blocks."""

MIN_PROGRAMS: Final = 640
"""Programs that there are at least, by splitting K: an H100 loses 15 % with 448 of them."""
MIN_STEPS_PER_SPLIT: Final = 4

MAX_NEWEST_TOKENS: Final = {4: 64, 3: 32}
"""Of a program, by bits: Triton 3.7 gives each of the four or eight products of a turn sums of its
own in tensor memory, which has 512 columns."""

REDUCE_BLOCK_N: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up."""

    block_t: int
    """Tokens of a program; 1 is the kernel without tensor cores."""
    block_n: int
    """Rows of a program: a multiple of 64, but for that kernel."""
    step: int
    """Tiles of K in one turn of the loop."""
    splits: int
    """Parts of K that are summed apart."""
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""

    def tiles_per_split(self, num_tiles: int) -> int:
        """A multiple of `step`."""
        return int(triton.cdiv(triton.cdiv(num_tiles, self.step), self.splits)) * self.step


def choose_tile(
    bits: int, n_tokens: int, n_out: int, num_tiles: int, *, chip: Chip = Chip.LARGE
) -> Tile:
    """By bits and the number of tokens; the splits also by the weight's shape. The fastest of those
    tried on an H100.

    Args:
        num_tiles: tiles of one row of tiles, K / 128 or K / 256 rounded up.
        chip: that it is for.
    """
    step = 1
    if n_tokens <= 32:
        block_t = 16 if n_tokens <= 16 else 32
        is_wide = bits == 4 and chip is not Chip.NEWEST
        block_n, num_warps, num_stages = (128 if is_wide else 64), 4, 4
    elif n_tokens <= 64:
        block_t, block_n, num_warps = 64, 128, 8
        num_stages = 3 if bits == 4 else 2
    else:
        block_t = 128 if bits == 4 else 64
        block_n, num_warps = 128, 8
        num_stages = 2 if chip is Chip.SMALL or bits == 3 else 3
    if chip is Chip.NEWEST:
        block_t = min(block_t, MAX_NEWEST_TOKENS[bits])
    splits = 1
    if n_tokens <= 64:
        wanted = triton.cdiv(MIN_PROGRAMS, triton.cdiv(n_out, block_n))
        splits = max(1, min(wanted, num_tiles // MIN_STEPS_PER_SPLIT))
        splits = triton.cdiv(num_tiles, triton.cdiv(num_tiles, splits))  # none without a step
    return Tile(
        block_t=block_t,
        block_n=block_n,
        step=step,
        splits=splits,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def one_token_tile(bits: int, n_out: int, num_tiles: int) -> Tile:
    """Of the kernel without tensor cores."""
    step, block_n = (4, 4) if bits == 4 else (2, 8)
    steps = triton.cdiv(num_tiles, step)
    wanted = 8192 // triton.cdiv(n_out, block_n)
    splits = max(1, min(wanted, steps // MIN_STEPS_PER_SPLIT))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))
    return Tile(block_t=1, block_n=block_n, step=step, splits=splits, num_warps=1, num_stages=1)


@triton.jit  # type: ignore[untyped-decorator]
def _tile_ptrs(packed_ptr, rows, num_tiles, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where some rows' columns of the first tile are, [rows, 32]."""
    size: tl.constexpr = 64 * 32 if BITS == 4 else 3 * 64 * 32
    columns = tl.arange(0, 32)
    starts = (rows // 64).to(tl.int64) * num_tiles * size + (rows % 64) * 32
    return packed_ptr + starts[:, None] + columns[None, :]


@triton.jit
def _load_scale(scale_zero_ptr, rows, piece, N, G, group_pieces):  # type: ignore[no-untyped-def]
    """Scale and zero of some rows [rows] fp32, of the group that holds 32 features; a word has both
    as bf16."""
    group = tl.minimum(piece // group_pieces, G - 1)
    words = tl.load(scale_zero_ptr + group.to(tl.int64) * N + rows)
    scale = (words << 16).to(tl.float32, bitcast=True)
    zero = (words >> 16 << 16).to(tl.float32, bitcast=True)
    return scale, zero


@triton.jit  # type: ignore[untyped-decorator]
def _gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_zero_ptr, bias_ptr, out_ptr,
    T, N, K, G, group_pieces, num_tiles, tiles_per_split,
    stride_xt,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, BITS: tl.constexpr, PTX: tl.constexpr,
    GROUPS: tl.constexpr, STEP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """out is y [T, N], or the workspace [splits, T, N]; GROUPS is how often scales change within
    128 features: 1, 2 or 4 times."""
    BLOCKS: tl.constexpr = 1 if BITS == 4 else 2
    SIZE: tl.constexpr = 64 * 32 if BITS == 4 else 3 * 64 * 32
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    block_t, block_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    columns = tl.arange(0, 32)
    x_ptrs = x_ptr + offs_t.to(tl.int64)[:, None] * stride_xt + columns[None, :]
    in_batch = (offs_t < T)[:, None]
    tile_ptrs = _tile_ptrs(packed_ptr, rows, num_tiles, BITS)
    begin = tl.program_id(1) * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, num_tiles)

    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for first in range(begin, end, STEP):
        for j in tl.static_range(STEP):
            # Past the end the last tile is read again, and x is 0.
            tile = tl.minimum(first + j, end - 1)
            num_features = tl.where(first + j < end, K, 0)
            ptrs = tile_ptrs + tile.to(tl.int64) * SIZE
            top = tl.load(ptrs + (SIZE - 64 * 32)) if BITS == 3 else 0
            for half in tl.static_range(BLOCKS):
                column = tl.load(ptrs + half * 64 * 32)
                values = fields(column, top, half, BITS, DTYPE, PTX)
                piece = (tile * BLOCKS + half) * 4
                scale, zero = _load_scale(scale_zero_ptr, rows, piece, N, G, group_pieces)
                for i in tl.static_range(4):
                    if i > 0 and i % (4 // GROUPS) == 0:
                        scale, zero = _load_scale(
                            scale_zero_ptr, rows, piece + i, N, G, group_pieces
                        )
                    offset = (piece + i) * 32
                    mask = in_batch & (offset + columns < num_features)[None, :]
                    x = tl.load(x_ptrs + offset, mask=mask, other=0.0)
                    weight = values[i] * scale.to(DTYPE)[:, None] + zero.to(DTYPE)[:, None]
                    acc = tl.dot(weight, tl.trans(x), acc)
    y = tl.trans(acc)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    elif HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=in_batch & (offs_n < N)[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_zero_ptr, bias_ptr, out_ptr,
    T, N, K, G, group_pieces, num_tiles, tiles_per_split,
    stride_xt,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One token of each program, those with the same rows of the weight together; without tensor
    cores. out is y [T, N], or the workspace [splits, T, N]."""
    BLOCKS: tl.constexpr = 1 if BITS == 4 else 2
    SIZE: tl.constexpr = 64 * 32 if BITS == 4 else 3 * 64 * 32
    token = (tl.program_id(0) % T).to(tl.int64)
    offs_n = tl.program_id(0) // T * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    columns = tl.arange(0, 32)
    x_ptr += token * stride_xt
    row_ptrs = _tile_ptrs(packed_ptr, rows, num_tiles, BITS)[:, None, :]
    begin = tl.program_id(1) * tiles_per_split
    end = tl.minimum(begin + tiles_per_split, num_tiles)

    acc = tl.zeros((BLOCK_N, STEP, 32), dtype=tl.float32)
    for first in range(begin, end, STEP):
        tiles = first + tl.arange(0, STEP)
        mask = (tiles < end)[None, :, None]
        ptrs = row_ptrs + (tiles.to(tl.int64) * SIZE)[None, :, None]
        top = tl.load(ptrs + (SIZE - 64 * 32), mask=mask, other=0) if BITS == 3 else 0
        for half in tl.static_range(BLOCKS):
            column = tl.load(ptrs + half * 64 * 32, mask=mask, other=0)
            for i in tl.static_range(4):
                pieces = (tiles * BLOCKS + half) * 4 + i
                groups = tl.minimum(pieces // group_pieces, G - 1)
                words = tl.load(scale_zero_ptr + groups.to(tl.int64)[None, :] * N + rows[:, None])
                scale = (words << 16).to(tl.float32, bitcast=True)[:, :, None]
                zero = (words >> 16 << 16).to(tl.float32, bitcast=True)[:, :, None]
                features = pieces[:, None] * 32 + columns[None, :]
                is_feature = (tiles < end)[:, None] & (features < K)
                x = tl.load(x_ptr + features, mask=is_feature, other=0.0).to(tl.float32)[None]
                acc += (field(column, top, i, half, BITS) * scale + zero) * x
    y = tl.sum(tl.sum(acc, axis=2), axis=1)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    elif HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce_kernel(  # type: ignore[no-untyped-def]
    sums_ptr, bias_ptr, y_ptr,
    N, size, splits,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y [T, N] of the sums [splits, T, N], added from the first to the last; size is T · N."""
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets, mask = token * N + offs_n, offs_n < N
    sums_ptrs = sums_ptr + offsets
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(splits):
        y += tl.load(sums_ptrs, mask=mask, other=0.0)
        sums_ptrs += size
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantize_kernel(  # type: ignore[no-untyped-def]
    packed_ptr, scale_zero_ptr, out_ptr,
    N, K, G, num_tiles, group_pieces, stride_g,
    BITS: tl.constexpr,
):  # fmt: skip
    """out [N, K], a tile of each program; scales are [G, stride_g], N of each used."""
    BLOCKS: tl.constexpr = 1 if BITS == 4 else 2
    SIZE: tl.constexpr = 64 * 32 if BITS == 4 else 3 * 64 * 32
    tile = tl.program_id(1)
    offs_n = tl.program_id(0) * 64 + tl.arange(0, 64)
    rows = tl.minimum(offs_n, N - 1)
    columns = tl.arange(0, 32)
    ptrs = _tile_ptrs(packed_ptr, rows, num_tiles, BITS) + tile.to(tl.int64) * SIZE
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * K + columns[None, :]
    top = tl.load(ptrs + (SIZE - 64 * 32)) if BITS == 3 else 0
    for half in tl.static_range(BLOCKS):
        column = tl.load(ptrs + half * 64 * 32)
        for i in tl.static_range(4):
            piece = (tile * BLOCKS + half) * 4 + i
            scale, zero = _load_scale(scale_zero_ptr, rows, piece, stride_g, G, group_pieces)
            weight = field(column, top, i, half, BITS) * scale[:, None] + zero[:, None]
            mask = (offs_n < N)[:, None] & (piece * 32 + columns < K)[None, :]
            tl.store(out_ptrs + piece * 32, weight.to(out_ptr.dtype.element_ty), mask=mask)


def wxa16_linear(
    x: Tensor, weight: GroupWeight, bias: Tensor | None = None, *, capability: int | None = None
) -> Tensor:
    """Weight-only int4 or int3; see `reference.group_linear`.

    Args:
        x: [T, K] fp16 or bf16; rows may be a slice of wider ones; not changed.
        weight: in `Layout.TILES`, on x's device; a group of 32 input features or a multiple, or
            of all.
        bias: [N], of any floating dtype, or None.
        capability: of x's device × 10; asked of torch if None.
    Returns:
        [T, N], contiguous, dtype of x. The same input gives the same bits.
    Raises:
        ValueError: shapes, dtypes or the layout do not fit.
    """
    _check(x, weight, bias)
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    n_tokens, n_out = x.shape[0], weight.n_out
    if x.numel() == 0 or n_out == 0:
        y = x.new_zeros((n_tokens, n_out))
        return y if bias is None else y + bias
    x = x if x.stride(1) == 1 else x.contiguous()
    num_tiles = weight.packed.shape[1]
    if has_tensor_cores(x.device, capability):
        chip = chip_of(capability_of(x.device, capability))
        tile = choose_tile(weight.bits, n_tokens, n_out, num_tiles, chip=chip)
        return _launch(x, weight, bias, tile)
    if n_tokens <= MAX_TOKENS_ONE_BY_ONE:
        return _launch(x, weight, bias, one_token_tile(weight.bits, n_out, num_tiles))
    return dequantized_linear(x, weight, bias)


def dequantize(
    weight: GroupWeight, dtype: torch.dtype, first: int = 0, end: int | None = None
) -> Tensor:
    """Rows first to end of the weight that the integers stand for, [rows, K] of `dtype` (fp16 or
    bf16); `first` is a multiple of 64.

    Raises:
        ValueError: the layout or the dtype do not fit.
    """
    _check_weight(weight)
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {SUPPORTED_DTYPES}, got {dtype}")
    end = weight.n_out if end is None else end
    out = torch.empty((end - first, weight.n_in), dtype=dtype, device=weight.packed.device)
    if out.numel():
        packed = weight.packed[first // TILE_ROWS :]
        _dequantize_kernel[(triton.cdiv(end - first, TILE_ROWS), packed.shape[1])](
            packed, _scale_words(weight)[:, first:], out,
            end - first, weight.n_in, len(weight.scale_zero), packed.shape[1],
            _group_pieces(weight), weight.n_out,
            BITS=weight.bits,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def dequantized_linear(x: Tensor, weight: GroupWeight, bias: Tensor | None) -> Tensor:
    """Block after block of rows through cuBLAS: for many tokens. See `wxa16_linear`."""
    n_out, n_in = weight.n_out, weight.n_in
    y = x.new_empty((x.shape[0], n_out))
    step = max(1, DEQUANTIZE_ELEMENTS // n_in // TILE_ROWS) * TILE_ROWS
    for first in range(0, n_out, step):
        end = min(n_out, first + step)
        y[:, first:end] = x @ dequantize(weight, x.dtype, first, end).t()
    return y if bias is None else y.add_(bias)


def _check(x: Tensor, weight: GroupWeight, bias: Tensor | None) -> None:
    _check_weight(weight)
    n_out, n_in = weight.n_out, weight.n_in
    if x.ndim != 2 or x.shape[1] != n_in or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"x must be [T, {n_in}] in one of {SUPPORTED_DTYPES} for a weight [{n_out}, {n_in}], "
            f"got {list(x.shape)} {x.dtype}"
        )
    if bias is not None and bias.shape != (n_out,):
        raise ValueError(f"bias must be [{n_out}], got {list(bias.shape)}")


def _check_weight(weight: GroupWeight) -> None:
    if weight.layout is not Layout.TILES or weight.bits not in SUPPORTED_BITS:
        raise ValueError(
            f"the weight must be in {Layout.TILES} with one of {SUPPORTED_BITS} bits, got "
            f"{weight.layout} with {weight.bits}"
        )
    if weight.group_size % TILE_PIECE and weight.group_size != weight.n_in:
        raise ValueError(
            f"groups must have a multiple of {TILE_PIECE} input features, or all "
            f"{weight.n_in}, got {weight.group_size}"
        )


def _launch(x: Tensor, weight: GroupWeight, bias: Tensor | None, tile: Tile) -> Tensor:
    (n_tokens, n_in), n_out = x.shape, weight.n_out
    num_tiles = weight.packed.shape[1]
    y = x.new_empty((n_tokens, n_out))
    is_split = tile.splits > 1
    out = x.new_empty((tile.splits, *y.shape), dtype=torch.float32) if is_split else y
    blocks_n = triton.cdiv(n_out, tile.block_n)
    is_gemv = tile.block_t == 1
    constants: dict[str, Any] = {"BLOCK_N": tile.block_n, "STEP": tile.step}
    if not is_gemv:
        constants |= _gemm_constants(tile, weight.group_size, weight.n_in)
        constants["PTX"] = x.is_cuda
    kernel = _gemv_kernel if is_gemv else _gemm_kernel
    kernel[(triton.cdiv(n_tokens, tile.block_t) * blocks_n, tile.splits)](
        x, weight.packed, _scale_words(weight), x if bias is None else bias, out,
        n_tokens, n_out, n_in, len(weight.scale_zero), _group_pieces(weight), num_tiles,
        tile.tiles_per_split(num_tiles),
        x.stride(0),
        HAS_BIAS=bias is not None, IS_SPLIT=is_split, BITS=weight.bits, **constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if is_split:
        _reduce_kernel[(n_tokens, triton.cdiv(n_out, REDUCE_BLOCK_N))](
            out, x if bias is None else bias, y, n_out, y.numel(), tile.splits,
            HAS_BIAS=bias is not None, BLOCK_N=REDUCE_BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _gemm_constants(tile: Tile, group_size: int, n_in: int) -> dict[str, Any]:
    if group_size == n_in or group_size % BLOCK == 0:
        groups = 1
    else:
        groups = 2 if group_size % (BLOCK // 2) == 0 else 4
    return {"GROUPS": groups, "BLOCK_T": tile.block_t, "GROUP_T": GROUP_T}


def _scale_words(weight: GroupWeight) -> Tensor:
    """[G, N, 2] bf16 as [G, N] words: the scale in the low half."""
    return weight.scale_zero.contiguous().view(torch.int32).squeeze(-1)


def _group_pieces(weight: GroupWeight) -> int:
    """Runs of 32 features in a group; more than there are where all features are one."""
    if weight.group_size == weight.n_in:
        return weight.n_in
    return weight.group_size // TILE_PIECE


SHAPES: Final = ((250_880, 14_336), (14_336, 14_336))
"""(N, K) of real layers without and with splits at few tokens, groups of 128."""


def compile_cases() -> list[Case]:
    """Every variant that real layers launch."""
    cases = [
        case
        for bits in SUPPORTED_BITS
        for dtype in ("fp16", "bf16")
        for case in (*_product_cases(bits, dtype), *_other_cases(bits, dtype))
    ]
    return list({case.name: case for case in cases}.values())


def _pointers(bits: int) -> dict[str, str]:
    return {"packed_ptr": "*i16" if bits == 4 else "*u8", "scale_zero_ptr": "*i32"}


def _product_cases(bits: int, dtype: str) -> Iterator[Case]:
    sizes = (
        "T", "N", "K", "G", "group_pieces", "num_tiles", "tiles_per_split", "stride_xt",
    )  # fmt: skip
    for n_tokens in (1, 16, 32, 64, 512):
        for n_out, n_in in SHAPES:
            num_tiles = n_in // TILE_FEATURES[bits]
            tiles = [
                (False, mark, chips, tile)
                for tile, mark, chips in by_chip(
                    partial(_tile_for, bits, n_tokens, n_out, num_tiles)
                )
            ]
            if n_tokens == 1:
                tile = one_token_tile(bits, n_out, num_tiles)
                tiles.append((True, "", _capabilities(dtype), tile))
            for is_gemv, mark, capabilities, tile in tiles:
                is_split = tile.splits > 1
                constants: dict[str, Any] = {
                    "HAS_BIAS": True, "IS_SPLIT": is_split, "BITS": bits,
                    "BLOCK_N": tile.block_n, "STEP": tile.step,
                }  # fmt: skip
                if not is_gemv:
                    constants |= _gemm_constants(tile, 128, n_in) | {"PTX": True}
                kind = "one token without tensor cores" if is_gemv else f"T={n_tokens}{mark}"
                yield Case(
                    name=f"wxa16 {bits} bits {kind} {dtype}{' split' if is_split else ''}",
                    kernel=_gemv_kernel if is_gemv else _gemm_kernel,
                    types={
                        "x_ptr": f"*{dtype}", **_pointers(bits), "bias_ptr": f"*{dtype}",
                        "out_ptr": "*fp32" if is_split else f"*{dtype}",
                        **dict.fromkeys(sizes, "i32"),
                    },
                    constants=constants,
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    unaligned=frozenset(
                        {"T", "G", "group_pieces", "num_tiles", "tiles_per_split"}
                    ),
                    has_dot=not is_gemv,
                    capabilities=capabilities,
                )  # fmt: skip


def _tile_for(bits: int, n_tokens: int, n_out: int, num_tiles: int, chip: Chip) -> Tile:
    return choose_tile(bits, n_tokens, n_out, num_tiles, chip=chip)


def _other_cases(bits: int, dtype: str) -> Iterator[Case]:
    sizes = ("N", "K", "G", "num_tiles", "group_pieces", "stride_g")
    yield Case(
        name=f"wxa16 {bits} bits dequantize {dtype}",
        kernel=_dequantize_kernel,
        types={**_pointers(bits), "out_ptr": f"*{dtype}", **dict.fromkeys(sizes, "i32")},
        constants={"BITS": bits},
        num_warps=4,
        unaligned=frozenset({"G", "num_tiles", "group_pieces"}),
        has_dot=False,
        capabilities=_capabilities(dtype),
    )
    if bits == 4:  # the same for both
        yield Case(
            name=f"wxa16 reduce {dtype}",
            kernel=_reduce_kernel,
            types={
                "sums_ptr": "*fp32", "bias_ptr": f"*{dtype}", "y_ptr": f"*{dtype}",
                **dict.fromkeys(("N", "size", "splits"), "i32"),
            },
            constants={"HAS_BIAS": True, "BLOCK_N": REDUCE_BLOCK_N},
            num_warps=4,
            unaligned=frozenset({"splits"}),
            has_dot=False,
            capabilities=_capabilities(dtype),
        )  # fmt: skip


def _capabilities(dtype: str) -> tuple[int, ...]:
    return CAPABILITIES if dtype == "bf16" else (*OLD_CAPABILITIES, *CAPABILITIES)

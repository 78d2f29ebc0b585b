"""Weight-only int4 and int3 on a GPU: `w4a16` and `w3a16`. Weights are read once, packed.

    y[t, n] = Σ_k x[t, k] · ((q[n, k] - m) · scale[n, g] + zero[n, g]) + bias[n],   m = 2^(bits - 1)

T tokens, N output features, K input features, g the group of k. x [T, K] fp16 or bf16; q packed as
`Layout.PLANES` of `groups.py`; scale and zero bf16; bias [N] in x's dtype; y in x's dtype; sums are
fp32.

A pack is what one word (4 bits) or one word of each of three planes (3 bits) holds: P = 8 or 32
consecutive input features. Value i of all packs is one shift and one mask, so a sum over K is taken
as P sums over packs, one for each i, and x is put in that order first, [T, P, packs]: neither
weights nor x are shuffled among threads.

- 1 token: sums without tensor cores. Σ_k x · q and Σ_k x of a pack are multiplied by its scale and
  zero once.
- More: tensor cores, the weight widened to x's dtype in registers as the left operand.
- Where one sweep over N leaves processors idle, the packs are split as well, as in `w8a16`: the
  partial sums are added in a fixed order, so that the same input gives the same bits.
- Before capability 8.0 there are no tensor cores in Triton: a few tokens are taken one by one, and
  for more a block of rows is dequantised at a time and multiplied by cuBLAS.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case
from tightfit.kernels.formats import VALUES_PER_PACK
from tightfit.kernels.groups import GroupWeight, Layout
from tightfit.kernels.w8a16 import (
    DEQUANTIZE_ELEMENTS,
    GROUP_T,
    MAX_TOKENS_ONE_BY_ONE,
    MIN_PROGRAMS,
    MIN_STEPS_PER_SPLIT,
    SUPPORTED_DTYPES,
    has_tensor_cores,
    tile_of_program,
)

SUPPORTED_BITS: Final = (4, 3)
PACK_FEATURES: Final = {4: 8, 3: 32}
"""P."""

REDUCE_BLOCK_N: Final = 512
DEQUANTIZE_BLOCK: Final = (8, 64)
"""Rows and packs of one program of `_dequantize_kernel`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up."""

    block_t: int
    """Tokens of a program; 1 is the kernel without tensor cores."""
    block_n: int
    block_c: int
    """Packs of a step."""
    splits: int
    """Parts of the packs that are summed apart."""
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""

    def packs_per_split(self, num_packs: int) -> int:
        """A multiple of block_c."""
        return int(triton.cdiv(triton.cdiv(num_packs, self.block_c), self.splits)) * self.block_c


def choose_tile(bits: int, n_tokens: int, n_out: int, num_packs: int) -> Tile:
    """By bits and the number of tokens; the splits also by the weight's shape."""
    num_stages = 3 if bits == 4 else 1  # a step of 3 bits has 32 pieces of x: one stage is full
    if n_tokens == 1:
        block_t, block_c, num_stages = 1, 128, 1
        block_n, num_warps = (4, 1) if bits == 4 else (2, 2)  # larger, 3 bits spill registers
    elif n_tokens <= 64:
        block_t = 16 if n_tokens <= 16 else 32 if n_tokens <= 32 else 64
        block_n, block_c = 64, 16
        num_warps = 8 if bits == 3 and block_t == 64 else 4
    else:
        block_t, block_n, block_c, num_warps = 64, 128, 16, 8
    splits = 1
    if n_tokens <= 64:
        wanted = MIN_PROGRAMS["gemv" if n_tokens == 1 else "gemm"] // triton.cdiv(n_out, block_n)
        steps = triton.cdiv(num_packs, block_c)
        splits = max(1, min(wanted, steps // MIN_STEPS_PER_SPLIT))
        splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    return Tile(
        block_t=block_t,
        block_n=block_n,
        block_c=block_c,
        splits=splits,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _load_packs(packed_ptr, rows, packs, C, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of some packs of some rows, [rows, packs] each: low bits of the first half, of the
    second, and the top bits; all the same for 4 bits."""
    planes: tl.constexpr = 1 if BITS == 4 else 3
    ptrs = packed_ptr + rows.to(tl.int64)[:, None] * (planes * C) + packs[None, :]
    first = tl.load(ptrs, mask=mask[None, :], other=0)
    if BITS == 4:
        return first, first, first
    second = tl.load(ptrs + C, mask=mask[None, :], other=0)
    top = tl.load(ptrs + 2 * C, mask=mask[None, :], other=0)
    return first, second, top


@triton.jit  # type: ignore[untyped-decorator]
def _value(first, second, top, i: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """q of each pack's feature i, fp32."""
    if BITS == 4:
        q = (first >> (4 * i)) & 15
    elif i < 16:
        q = ((first >> (2 * i)) & 3) | (((top >> i) & 1) << 2)
    else:
        q = ((second >> (2 * (i - 16))) & 3) | (((top >> i) & 1) << 2)
    return q.to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _load_scales(scale_zero_ptr, rows, packs, N, G, group_packs, mask, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale, and what the integer 0 stands for, [rows, packs] fp32; a word has both as bf16."""
    groups = tl.minimum(packs // group_packs, G - 1)
    ptrs = scale_zero_ptr + groups.to(tl.int64)[None, :] * N + rows[:, None]
    words = tl.load(ptrs, mask=mask[None, :], other=0)
    scale = (words << 16).to(tl.float32, bitcast=True)
    zero = (words >> 16 << 16).to(tl.float32, bitcast=True)
    middle: tl.constexpr = 1 << (BITS - 1)
    return scale, zero - middle * scale


@triton.jit  # type: ignore[untyped-decorator]
def _gemv_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_zero_ptr, bias_ptr, out_ptr,
    T, N, C, G, group_packs, packs_per_split,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One token of each program, those with the same rows of the weight together. x is [T, P, C];
    out is y [T, N], or the workspace [splits, T, N]."""
    token = (tl.program_id(0) % T).to(tl.int64)
    offs_n = tl.program_id(0) // T * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    x_ptr += token * P * C
    begin = tl.program_id(1) * packs_per_split
    end = tl.minimum(begin + packs_per_split, C)

    acc = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for c in range(begin, end, BLOCK_C):
        packs = c + tl.arange(0, BLOCK_C)
        mask = packs < end
        first, second, top = _load_packs(packed_ptr, rows, packs, C, mask, BITS)
        scale, lowest = _load_scales(scale_zero_ptr, rows, packs, N, G, group_packs, mask, BITS)
        products = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
        total = tl.zeros((BLOCK_C,), dtype=tl.float32)
        for i in tl.static_range(P):
            x = tl.load(x_ptr + i * C + packs, mask=mask, other=0.0).to(tl.float32)
            products += _value(first, second, top, i, BITS) * x[None, :]
            total += x
        acc += products * scale + lowest * total[None, :]
    y = tl.sum(acc, axis=1)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    elif HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit  # type: ignore[untyped-decorator]
def _gemm_kernel(  # type: ignore[no-untyped-def]
    x_ptr, packed_ptr, scale_zero_ptr, bias_ptr, out_ptr,
    T, N, C, G, group_packs, packs_per_split,
    HAS_BIAS: tl.constexpr, IS_SPLIT: tl.constexpr, BITS: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP_T: tl.constexpr,
):  # fmt: skip
    """x is [T, P, C]; out is y [T, N], or the workspace [splits, T, N]."""
    block_t, block_n = tile_of_program(T, N, BLOCK_T, BLOCK_N, GROUP_T)
    offs_t = block_t * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1)  # past the end the last row is read again, and not stored
    tokens = tl.minimum(offs_t, T - 1).to(tl.int64)
    x_ptrs = x_ptr + tokens[:, None] * (P * C)
    begin = tl.program_id(1) * packs_per_split
    end = tl.minimum(begin + packs_per_split, C)

    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for c in range(begin, end, BLOCK_C):
        packs = c + tl.arange(0, BLOCK_C)
        mask = packs < end
        first, second, top = _load_packs(packed_ptr, rows, packs, C, mask, BITS)
        scale, lowest = _load_scales(scale_zero_ptr, rows, packs, N, G, group_packs, mask, BITS)
        for i in tl.static_range(P):
            x = tl.load(x_ptrs + (i * C + packs)[None, :], mask=mask[None, :], other=0.0)
            weight = _value(first, second, top, i, BITS) * scale + lowest
            acc = tl.dot(weight.to(x.dtype), tl.trans(x), acc)
    y = tl.trans(acc)

    if IS_SPLIT:
        out_ptr += tl.program_id(1).to(tl.int64) * T * N
    elif HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_t.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_t < T)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


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
    N, C, G, group_packs,
    BITS: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [N, P, C], the weight in the order in which x is put."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    packs = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.minimum(offs_n, N - 1)
    mask = packs < C
    first, second, top = _load_packs(packed_ptr, rows, packs, C, mask, BITS)
    scale, lowest = _load_scales(scale_zero_ptr, rows, packs, N, G, group_packs, mask, BITS)
    out_ptrs = out_ptr + offs_n.to(tl.int64)[:, None] * (P * C) + packs[None, :]
    is_inside = (offs_n < N)[:, None] & mask[None, :]
    for i in tl.static_range(P):
        weight = _value(first, second, top, i, BITS) * scale + lowest
        tl.store(out_ptrs + i * C, weight.to(out_ptr.dtype.element_ty), mask=is_inside)


def wxa16_linear(
    x: Tensor, weight: GroupWeight, bias: Tensor | None = None, *, capability: int | None = None
) -> Tensor:
    """Weight-only int4 or int3; see `reference.group_linear`.

    Args:
        x: [T, K] fp16 or bf16; not changed.
        weight: in `Layout.PLANES`, on x's device; a group of 32 input features or a multiple, or
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
    ordered = _ordered(x, weight)
    if not has_tensor_cores(x.device, capability) and n_tokens > 1:
        if n_tokens > MAX_TOKENS_ONE_BY_ONE:
            return _dequantized_linear(ordered, weight, bias)
        return _launch(ordered, weight, bias, _tile(weight, 1))
    return _launch(ordered, weight, bias, _tile(weight, n_tokens))


def dequantize(weight: GroupWeight, dtype: torch.dtype) -> Tensor:
    """The weight that the integers stand for, [N, K] of `dtype` (fp16 or bf16).

    Raises:
        ValueError: the layout or the dtype do not fit.
    """
    _check_weight(weight)
    if dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"dtype must be one of {SUPPORTED_DTYPES}, got {dtype}")
    ordered = _dequantized(weight.packed, weight.scale_zero, weight, dtype)
    return ordered.transpose(1, 2).reshape(weight.n_out, -1)[:, : weight.n_in].contiguous()


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
    if weight.layout is not Layout.PLANES or weight.bits not in SUPPORTED_BITS:
        raise ValueError(
            f"the weight must be in {Layout.PLANES} with one of {SUPPORTED_BITS} bits, got "
            f"{weight.layout} with {weight.bits}"
        )
    if weight.group_size % VALUES_PER_PACK[3] and weight.group_size != weight.n_in:
        raise ValueError(
            f"groups must have a multiple of {VALUES_PER_PACK[3]} input features, or all "
            f"{weight.n_in}, got {weight.group_size}"
        )


def _tile(weight: GroupWeight, n_tokens: int) -> Tile:
    return choose_tile(weight.bits, n_tokens, weight.n_out, weight.packed.shape[2])


def _ordered(x: Tensor, weight: GroupWeight) -> Tensor:
    """x [T, K] as [T, P, C], with zeros where packs have no features."""
    num_packs, features = weight.packed.shape[2], PACK_FEATURES[weight.bits]
    padded = F.pad(x, (0, num_packs * features - x.shape[1]))
    return padded.view(x.shape[0], num_packs, features).transpose(1, 2).contiguous()


def _launch(x: Tensor, weight: GroupWeight, bias: Tensor | None, tile: Tile) -> Tensor:
    """x [T, P, C] → [T, N]."""
    n_tokens, features, num_packs = x.shape
    n_out = weight.n_out
    y = x.new_empty((n_tokens, n_out))
    is_split = tile.splits > 1
    out = x.new_empty((tile.splits, *y.shape), dtype=torch.float32) if is_split else y
    blocks_n = triton.cdiv(n_out, tile.block_n)
    is_gemv = tile.block_t == 1
    kernel = _gemv_kernel if is_gemv else _gemm_kernel
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c}
    if not is_gemv:
        blocks |= {"BLOCK_T": tile.block_t, "GROUP_T": GROUP_T}
    kernel[(triton.cdiv(n_tokens, tile.block_t) * blocks_n, tile.splits)](
        x, weight.packed, _scale_words(weight.scale_zero), x if bias is None else bias, out,
        n_tokens, n_out, num_packs, len(weight.scale_zero), _group_packs(weight),
        tile.packs_per_split(num_packs),
        HAS_BIAS=bias is not None, IS_SPLIT=is_split, BITS=weight.bits, P=features, **blocks,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if is_split:
        _reduce_kernel[(n_tokens, triton.cdiv(n_out, REDUCE_BLOCK_N))](
            out, x if bias is None else bias, y, n_out, y.numel(), tile.splits,
            HAS_BIAS=bias is not None, BLOCK_N=REDUCE_BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return y


def _scale_words(scale_zero: Tensor) -> Tensor:
    """[G, N, 2] bf16 as [G, N] words: the scale in the low half."""
    return scale_zero.contiguous().view(torch.int32).squeeze(-1)


def _group_packs(weight: GroupWeight) -> int:
    """Packs of a group; more than there are where all features are one."""
    if weight.group_size == weight.n_in:
        return int(weight.packed.shape[2])
    return weight.group_size // PACK_FEATURES[weight.bits]


def _dequantized(
    packed: Tensor, scale_zero: Tensor, weight: GroupWeight, dtype: torch.dtype
) -> Tensor:
    """Some rows of a weight, [rows, P, C]."""
    n_out, _, num_packs = packed.shape
    features = PACK_FEATURES[weight.bits]
    out = torch.empty((n_out, features, num_packs), dtype=dtype, device=packed.device)
    block_n, block_c = DEQUANTIZE_BLOCK
    _dequantize_kernel[(triton.cdiv(n_out, block_n), triton.cdiv(num_packs, block_c))](
        packed, _scale_words(scale_zero), out,
        n_out, num_packs, len(scale_zero), _group_packs(weight),
        BITS=weight.bits, P=features, BLOCK_N=block_n, BLOCK_C=block_c,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _dequantized_linear(x: Tensor, weight: GroupWeight, bias: Tensor | None) -> Tensor:
    """x [T, P, C] → [T, N], block after block of rows through cuBLAS."""
    wide = x.flatten(1)
    y = x.new_empty((x.shape[0], weight.n_out))
    step = max(1, DEQUANTIZE_ELEMENTS // wide.shape[1])
    for first in range(0, weight.n_out, step):
        rows = slice(first, first + step)
        block = _dequantized(weight.packed[rows], weight.scale_zero[:, rows], weight, x.dtype)
        y[:, rows] = wide @ block.flatten(1).t()
    return y if bias is None else y.add_(bias)


SHAPES: Final = {"whole": (250_880, 14_336), "split": (14_336, 14_336)}
"""(N, K) of real layers with either kind of launch at one token, groups of 128."""


def compile_cases() -> list[Case]:
    """Every variant that real layers launch."""
    return [
        case
        for bits in SUPPORTED_BITS
        for dtype in ("fp16", "bf16")
        for case in (*_product_cases(bits, dtype), *_other_cases(bits, dtype))
    ]


POINTERS: Final = {"packed_ptr": "*i32", "scale_zero_ptr": "*i32"}


def _product_cases(bits: int, dtype: str) -> Iterator[Case]:
    for n_tokens in (1, 16, 32, 64, 512):
        num_packs = 14_336 // PACK_FEATURES[bits]
        tile = choose_tile(bits, n_tokens, 250_880, num_packs)
        is_gemv = n_tokens == 1
        for is_split in (False, True) if n_tokens <= 64 else (False,):
            constants: dict[str, Any] = {
                "HAS_BIAS": True, "IS_SPLIT": is_split, "BITS": bits, "P": PACK_FEATURES[bits],
                "BLOCK_N": tile.block_n, "BLOCK_C": tile.block_c,
            }  # fmt: skip
            if not is_gemv:
                constants |= {"BLOCK_T": tile.block_t, "GROUP_T": GROUP_T}
            sizes = ("T", "N", "C", "G", "group_packs", "packs_per_split")
            yield Case(
                name=f"wxa16 {bits} bits T={n_tokens} {dtype}{' split' if is_split else ''}",
                kernel=_gemv_kernel if is_gemv else _gemm_kernel,
                types={
                    "x_ptr": f"*{dtype}", **POINTERS, "bias_ptr": f"*{dtype}",
                    "out_ptr": "*fp32" if is_split else f"*{dtype}",
                    **dict.fromkeys(sizes, "i32"),
                },
                constants=constants,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                unaligned=frozenset({"T", "G"}),
                has_dot=not is_gemv,
                capabilities=_capabilities(dtype) if is_gemv else CAPABILITIES,
            )  # fmt: skip


def _other_cases(bits: int, dtype: str) -> Iterator[Case]:
    block_n, block_c = DEQUANTIZE_BLOCK
    yield Case(
        name=f"wxa16 {bits} bits dequantize {dtype}",
        kernel=_dequantize_kernel,
        types={
            **POINTERS, "out_ptr": f"*{dtype}",
            **dict.fromkeys(("N", "C", "G", "group_packs"), "i32"),
        },
        constants={
            "BITS": bits, "P": PACK_FEATURES[bits], "BLOCK_N": block_n, "BLOCK_C": block_c,
        },
        num_warps=4,
        unaligned=frozenset({"G"}),
        has_dot=False,
        capabilities=_capabilities(dtype),
    )  # fmt: skip
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

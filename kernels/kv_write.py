"""Keys and values of new tokens into the paged KV cache, quantised on the way where it is int8.

    scale[h, slot] = bf16(max_d |kv[t, h, d]| / 127)
    cache[h, slot, d] = round(kv[t, h, d] / scale[h, slot]), half to even         slot = slots[t]

T tokens, H_kv KV heads, D head size; h runs over 2 · H_kv heads, keys first. kv [T, 2 · H_kv · D]
fp16 or bf16; the cache as in `paged_tiles`. One kernel: kv is read once.

The scale is bf16: 2 bytes for each head and token are 1.6 % of 128 values, fp32 would be 3.1 %. The
values are computed with the rounded scale, so that its rounding costs nothing. A head with a NaN or
an infinity gets the scale NaN, so that attention tells of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case
from tightfit.kernels.paged_tiles import (
    CASE_HEAD_DIM,
    HEAD_DIM_STEP,
    MAX_HEAD_DIM,
    SUPPORTED_DTYPES,
    check_cache,
)
from tightfit.kernels.weights import INT8_MAX

ROUND: Final = 1.5 * 2**23
"""Added to and subtracted from an fp32 below 2^22 in size it rounds half to even: what is left has
no room for a fraction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up: a program for each token and some of its heads."""

    block_h: int
    """Heads of a program."""
    num_warps: int


TILE: Final = Tile(block_h=8, num_warps=4)
"""The same for all shapes: 16 bytes a thread of 8 heads with D = 128. Not measured yet."""


@triton.jit  # type: ignore[untyped-decorator]
def _quantize(x, LEVELS: tl.constexpr, ROUND: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 of the rows of x, fp32, and the bits of their bf16 scales."""
    scale = tl.div_rn(tl.max(tl.abs(x), axis=1), LEVELS * 1.0)
    bits = scale.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # bf16, half to even
    is_finite = tl.sum(x - x, axis=1) == 0.0  # the maximum of a NaN and a number may be either
    bits = tl.where(is_finite, tl.where(bits == 0, 0x3F80, bits), 0x7FC0)  # 1.0, NaN
    scale = (bits << 16).to(tl.float32, bitcast=True)
    steps = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    steps = tl.minimum(tl.maximum((steps + ROUND) - ROUND, -LEVELS * 1.0), LEVELS * 1.0)
    steps = tl.where(is_finite[:, None], steps, 0.0)
    return steps.to(tl.int8), bits.to(tl.int16)


@triton.jit  # type: ignore[untyped-decorator]
def _write_kernel(  # type: ignore[no-untyped-def]
    kv_ptr, slots_ptr, cache_ptr, scales_ptr,
    num_heads, num_slots,
    stride_kv,
    HAS_SCALES: tl.constexpr, LEVELS: tl.constexpr, ROUND: tl.constexpr,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Some heads, of all 2 · H_kv, of one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    is_stored = heads < tl.where(slot >= 0, num_heads, 0)
    dims = tl.arange(0, BLOCK_D)
    mask = is_stored[:, None] & (dims < D)[None, :]
    offsets = heads[:, None] * D + dims[None, :]
    x = tl.load(kv_ptr + token * stride_kv + offsets, mask=mask, other=0.0)
    places = heads.to(tl.int64) * num_slots + slot
    if HAS_SCALES:
        values, scale_bits = _quantize(x.to(tl.float32), LEVELS, ROUND)
        tl.store(scales_ptr + places, scale_bits, mask=is_stored)
    else:
        values = x
    tl.store(cache_ptr + places[:, None] * D + dims[None, :], values, mask=mask)


def write_kv(cache: Tensor, scales: Tensor | None, kv: Tensor, slots: Tensor) -> None:
    """Store the keys and values of T tokens in place; see `reference.write_kv`.

    Args:
        cache: of one layer, [2 · KV heads, slots, D] contiguous, kv's dtype or int8; D a multiple
            of 16, at most 128.
        scales: [2 · KV heads, slots] bf16, contiguous, with an int8 cache; else None.
        kv: [T, 2 · KV heads · D] fp16 or bf16, keys first; rows may be a slice of wider ones.
        slots: [T] int64, block id · block size + offset, no two the same; a negative one is
            skipped: a graph's padding.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    kv, slots = _check(cache, scales, kv, slots)
    n_tokens = kv.shape[0]
    if n_tokens == 0:
        return
    num_heads, num_slots, head_dim = cache.shape
    _write_kernel[(n_tokens, triton.cdiv(num_heads, TILE.block_h))](
        kv, slots, cache, cache if scales is None else scales.view(torch.int16),
        num_heads, num_slots,
        kv.stride(0),
        **_constants(head_dim, has_scales=scales is not None),
        num_warps=TILE.num_warps, enable_fp_fusion=True,
    )  # fmt: skip


def _constants(head_dim: int, *, has_scales: bool) -> dict[str, Any]:
    return {
        "HAS_SCALES": has_scales, "LEVELS": INT8_MAX, "ROUND": ROUND,
        "D": head_dim, "BLOCK_H": TILE.block_h, "BLOCK_D": int(triton.next_power_of_2(head_dim)),
    }  # fmt: skip


def _check(
    cache: Tensor, scales: Tensor | None, kv: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """kv and slots as the kernel can read them."""
    if kv.ndim != 2 or kv.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"kv must be [T, 2 · KV heads · D] in one of {SUPPORTED_DTYPES}, got "
            f"{list(kv.shape)} {kv.dtype}"
        )
    if cache.ndim != 3 or cache.shape[0] * cache.shape[2] != kv.shape[1] or cache.shape[0] % 2:
        raise ValueError(
            f"the cache must be [2 · KV heads, slots, D] with {kv.shape[1]} values of a token as "
            f"kv, got {list(cache.shape)}"
        )
    num_heads, _, head_dim = cache.shape
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"D must be 16, 32, … or {MAX_HEAD_DIM}, got {head_dim}")
    check_cache(cache, scales, num_heads // 2, head_dim, kv.dtype)
    if slots.shape != (kv.shape[0],) or slots.dtype is not torch.int64:
        raise ValueError(
            f"slots must be [{kv.shape[0]}] int64, got {list(slots.shape)} {slots.dtype}"
        )
    return (kv if kv.stride(1) == 1 else kv.contiguous()), slots.contiguous()


def compile_cases() -> list[Case]:
    """Every variant that real layers launch."""
    return [
        _case(dtype, is_int8=is_int8) for dtype in ("fp16", "bf16") for is_int8 in (False, True)
    ]


def _case(dtype: str, *, is_int8: bool) -> Case:
    return Case(
        name=f"kv_write {dtype}{' int8' * is_int8}",
        kernel=_write_kernel,
        types={
            "kv_ptr": f"*{dtype}", "slots_ptr": "*i64",
            "cache_ptr": "*i8" if is_int8 else f"*{dtype}",
            "scales_ptr": "*i16" if is_int8 else f"*{dtype}",
            "num_heads": "i32", "num_slots": "i32", "stride_kv": "i32",
        },
        constants=_constants(CASE_HEAD_DIM, has_scales=is_int8),
        num_warps=TILE.num_warps,
        has_dot=False,
        capabilities=CAPABILITIES if dtype == "bf16" else (*OLD_CAPABILITIES, *CAPABILITIES),
    )  # fmt: skip

"""What the kernels for attention over the paged KV cache share: where a position's key and value
lie, and attention of a tile of query rows on tensor cores.

The cache of one layer is [2 · H_kv, num_slots, D], all key heads first; slot = block id ·
block size + offset. In fp16 or bf16; or int8 with scales [2 · H_kv, num_slots] bf16, read as their
16 bits: value = int8 · scale.

    s[m, j] = (q[m] · k[j]) · scale + slope[m] · (j - position[m])     j ≤ position[m]
    out[m] = Σ_j exp(s[m, j] - max_j s[m, j]) · v[j] / Σ_j exp(s[m, j] - max_j s[m, j])

Online softmax (arXiv 2205.14135) with powers of two: `scale` and `slope` come times log₂ e. Keys
and values past the end are not read: zeros stand for them, whatever the cache holds there.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E: Final = 1.4426950408889634

SUPPORTED_DTYPES: Final = (torch.float16, torch.bfloat16)

MAX_HEAD_DIM: Final = 128

HEAD_DIM_STEP: Final = 16
"""Of which a head's size is a multiple: int8 rows then start at multiples of 16 bytes."""


@triton.jit  # type: ignore[untyped-decorator]
def find_slots(table_ptr, positions, mask, BLOCK_SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a sequence's positions lie in the cache, int64."""
    blocks = tl.load(table_ptr + positions // BLOCK_SIZE, mask=mask, other=0)
    return blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE


@triton.jit
def load_scales(scales_ptr, slots, mask):  # type: ignore[no-untyped-def]
    """The bf16 whose bits lie at `scales_ptr` (int16), in fp32; 0 where the mask is not set."""
    bits = tl.load(scales_ptr + slots, mask=mask, other=0)
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def attend(  # type: ignore[no-untyped-def]
    q, positions, slopes, best, total, acc,
    table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
    first, end, scale,
    IS_MASKED: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_SLOPES: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Query rows q [M, BLOCK_D] at `positions` [M] on the keys from `first` to `end`.

    best, total [M] and acc [M, BLOCK_D], fp32, are the running maximum, sum and weighted values;
    the new ones are returned. Without IS_MASKED all rows see all these keys, whole steps of them.
    Pointers are to the KV head's own rows; `slopes` [M].
    """
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < D)[None, :]
    for step in range(first, end, BLOCK_S):
        keys = step + tl.arange(0, BLOCK_S)
        in_range = keys < end
        slots = find_slots(table_ptr, keys, in_range, BLOCK_SIZE)
        offsets = slots[:, None] * D + dims[None, :]
        mask = in_range[:, None] & in_head
        k = tl.load(keys_ptr + offsets, mask=mask, other=0)
        v = tl.load(values_ptr + offsets, mask=mask, other=0)
        scores = tl.dot(q, tl.trans(k.to(q.dtype))) * scale
        if HAS_SCALES:
            scores *= load_scales(key_scales_ptr, slots, in_range)[None, :]
        if HAS_SLOPES:
            distance = keys.to(tl.float32)[None, :] - positions.to(tl.float32)[:, None]
            scores += slopes[:, None] * distance
        if IS_MASKED:
            is_seen = in_range[None, :] & (keys[None, :] <= positions[:, None])
            scores = tl.where(is_seen, scores, float("-inf"))

        new_best = tl.maximum(best, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_best[:, None])
        shrink = tl.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, axis=1)
        if HAS_SCALES:
            v_scales = load_scales(value_scales_ptr, slots, in_range)
            v = v.to(tl.float32) * v_scales[:, None]
        acc = tl.dot(weights.to(q.dtype), v.to(q.dtype), acc * shrink[:, None])
        best = new_best
    return best, total, acc


def check_cache(
    cache: Tensor, scales: Tensor | None, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """Raise ValueError where a layer's cache is not [2 · KV heads, slots, D] of `dtype` without
    scales, or of int8 with them."""
    if (
        cache.ndim != 3
        or cache.shape[0] != 2 * num_kv_heads
        or cache.shape[2] != head_dim
        or cache.dtype is not (dtype if scales is None else torch.int8)
        or not cache.is_contiguous()
    ):
        raise ValueError(
            f"the cache must be [{2 * num_kv_heads}, slots, {head_dim}] and contiguous, {dtype} or "
            f"int8 with scales, got {list(cache.shape)} {cache.dtype} with strides "
            f"{list(cache.stride())} and {'no ' if scales is None else ''}scales"
        )
    if scales is not None and (
        scales.shape != cache.shape[:2]
        or scales.dtype is not torch.bfloat16
        or not scales.is_contiguous()
    ):
        raise ValueError(
            f"scales must be {list(cache.shape[:2])} bfloat16 and contiguous, got "
            f"{list(scales.shape)} {scales.dtype}"
        )


LOWEST: Final = -3.0e38
"""Where running maxima start: finite, so that a row without a key yet has no ∞ - ∞."""


def cache_types(dtype: str, *, is_int8: bool) -> dict[str, str]:
    """Triton's types of the pointers that all these kernels have, for their compile cases."""
    return {
        "query_ptr": f"*{dtype}", "cache_ptr": "*i8" if is_int8 else f"*{dtype}",
        "scales_ptr": "*i16" if is_int8 else f"*{dtype}", "slopes_ptr": "*fp32",
        "tables_ptr": "*i32",
    }  # fmt: skip


def cache_constants(
    head_dim: int, block_size: int, *, has_scales: bool, has_slopes: bool
) -> dict[str, Any]:
    """The `tl.constexpr` arguments that all these kernels have."""
    return {
        "HAS_SCALES": has_scales, "HAS_SLOPES": has_slopes, "LOWEST": LOWEST, "LOG2_E": LOG2_E,
        "D": head_dim, "BLOCK_SIZE": block_size,
        "BLOCK_D": max(16, int(triton.next_power_of_2(head_dim))),
    }  # fmt: skip


CASE_HEAD_DIM: Final = 128
"""Of BLOOM-176B, OPT-175B and Llama-like models: kernels are compiled ahead of time for it."""

CASE_BLOCK_SIZE: Final = 16

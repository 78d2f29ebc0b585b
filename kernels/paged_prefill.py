"""Attention of chunks: many query tokens of a sequence on its paged KV cache.

    out[t, h] = softmax_j((q[t, h] · k[j, g]) · scale + slope[h] · (j - p[t])) · v[j, g]    j ≤ p[t]

T tokens, H heads, H_kv KV heads, D head size, g = h // (H / H_kv), p the token's position. query
and out [T, H · D] fp16 or bf16; the cache as in `paged_tiles`. A program takes a head and up to 64
query tokens (a tile of the plan), walks over the keys in steps and keeps sums in fp32. Steps
that all its rows see are not masked.

Before capability 8.0 Triton has no tensor cores: there a sequence's keys and values are gathered
and torch attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.attention_plan import QUERIES_PER_TILE, AttentionPlan, Chunk
from tightfit.kernels.compiled import CAPABILITIES, Case
from tightfit.kernels.paged_tiles import (
    CASE_BLOCK_SIZE,
    CASE_HEAD_DIM,
    LOG2_E,
    attend,
    cache_constants,
    cache_types,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up."""

    block_m: int
    """Query tokens of a program."""
    block_s: int
    """Keys of a step."""
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""


LARGE_STEP_CAPABILITY: Final = 90
"""From which on a step has 64 keys: before it, registers would spill."""


def choose_tile(capability: int) -> Tile:
    """By the chip's capability × 10; the same for all shapes. Not measured yet."""
    block_s = 64 if capability >= LARGE_STEP_CAPABILITY else 32
    return Tile(block_m=QUERIES_PER_TILE, block_s=block_s, num_warps=4, num_stages=2)


@triton.jit(do_not_specialize=["stride_table"])  # type: ignore[untyped-decorator]
def _prefill_kernel(  # type: ignore[no-untyped-def]
    query_ptr, cache_ptr, scales_ptr, slopes_ptr, tables_ptr,
    rows_ptr, counts_ptr, contexts_ptr, tiles_ptr, out_ptr,
    num_heads, num_kv_heads, num_slots,
    stride_query, stride_table,
    scale,
    HAS_SCALES: tl.constexpr, HAS_SLOPES: tl.constexpr,
    LOWEST: tl.constexpr, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of one head."""
    sequence = tl.load(tiles_ptr + 2 * tl.program_id(0))
    first = tl.load(tiles_ptr + 2 * tl.program_id(0) + 1)
    head = tl.program_id(1)
    kv_head = head // (num_heads // num_kv_heads)
    count, context = tl.load(counts_ptr + sequence), tl.load(contexts_ptr + sequence)
    queries = first + tl.arange(0, BLOCK_M)
    is_query = queries < count
    rows = (tl.load(rows_ptr + sequence) + queries).to(tl.int64)
    positions = context - count + queries
    dims = tl.arange(0, BLOCK_D)
    mask = is_query[:, None] & (dims < D)[None, :]
    q_ptrs = query_ptr + rows[:, None] * stride_query + head * D + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head) * LOG2_E
    slopes = tl.full((BLOCK_M,), slope, dtype=tl.float32)

    table_ptr = tables_ptr + sequence.to(tl.int64) * stride_table
    first_key = kv_head.to(tl.int64) * num_slots
    first_value = (kv_head + num_kv_heads).to(tl.int64) * num_slots
    keys_ptr, values_ptr = cache_ptr + first_key * D, cache_ptr + first_value * D
    key_scales_ptr, value_scales_ptr = scales_ptr + first_key, scales_ptr + first_value
    best = tl.full((BLOCK_M,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    start = context - count + first  # the first row's position: what it sees, all see
    seen_by_all = (start + 1) // BLOCK_S * BLOCK_S
    best, total, acc = attend(
        q, positions, slopes, best, total, acc,
        table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
        0, seen_by_all, scale,
        False, HAS_SCALES, HAS_SLOPES, D, BLOCK_SIZE, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    best, total, acc = attend(
        q, positions, slopes, best, total, acc,
        table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr,
        seen_by_all, tl.minimum(start + BLOCK_M, context), scale,
        True, HAS_SCALES, HAS_SLOPES, D, BLOCK_SIZE, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    out_ptrs = out_ptr + (rows * num_heads + head)[:, None] * D + dims[None, :]
    tl.store(out_ptrs, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def attend_chunks(
    query: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    plan: AttentionPlan,
    out: Tensor,
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    softmax_scale: float,
    slopes: Tensor | None,
    capability: int,
) -> None:
    """The plan's chunks into their rows of out; arguments as `paged_attention` checked them."""
    num_heads = query.shape[1] // head_dim
    tile = choose_tile(capability)
    # A pointer that is not read stands where one is wanted.
    _prefill_kernel[(plan.tiles.shape[0], num_heads)](
        query, cache, cache if scales is None else scales.view(torch.int16),
        query if slopes is None else slopes, plan.tables,
        plan.rows, plan.counts, plan.contexts, plan.tiles, out,
        num_heads, num_kv_heads, cache.shape[1],
        query.stride(0), plan.tables.stride(0),
        softmax_scale * LOG2_E,
        **cache_constants(
            head_dim, block_size, has_scales=scales is not None, has_slopes=slopes is not None
        ),
        BLOCK_M=tile.block_m, BLOCK_S=tile.block_s,
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip


def attend_chunks_by_torch(
    query: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    plan: AttentionPlan,
    out: Tensor,
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    softmax_scale: float,
    slopes: Tensor | None,
) -> None:
    """The same without tensor cores in Triton: one chunk after another, gathered, by torch."""
    for chunk in plan.chunks:
        rows = slice(chunk.row, chunk.row + chunk.num_tokens)
        keys = torch.arange(chunk.context, device=query.device)
        slots = plan.tables[chunk.sequence].index_select(0, keys // block_size).long() * block_size
        slots += keys % block_size
        kv = cache.index_select(1, slots).to(query.dtype)
        if scales is not None:
            kv *= scales.index_select(1, slots).to(query.dtype)[:, :, None]
        # The heads that share a KV head stand where queries stand: nothing is repeated.
        q = query[rows].view(chunk.num_tokens, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            q.reshape(1, num_kv_heads, -1, head_dim),
            kv[None, :num_kv_heads],
            kv[None, num_kv_heads:],
            attn_mask=_mask(chunk, keys, q.shape[1], slopes, query.dtype),
            scale=softmax_scale,
        )
        by_token = attended.view(num_kv_heads, -1, chunk.num_tokens, head_dim).permute(2, 0, 1, 3)
        out[rows] = by_token.reshape(chunk.num_tokens, -1)


def _mask(
    chunk: Chunk, keys: Tensor, heads_per_kv_head: int, slopes: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Additive, [1, 1 or KV heads, heads per KV head · queries, keys]: causal, with ALiBi."""
    positions = keys[chunk.context - chunk.num_tokens :]
    distance = keys[None, :] - positions[:, None]
    bias = torch.zeros(distance.shape, dtype=torch.float32, device=keys.device)
    bias.masked_fill_(distance > 0, float("-inf"))
    if slopes is None:
        return bias.to(dtype).repeat(heads_per_kv_head, 1)[None, None]
    biased = bias + slopes[:, None, None] * distance
    return biased.to(dtype).view(1, -1, heads_per_kv_head * chunk.num_tokens, keys.shape[0])


def compile_cases() -> list[Case]:
    """Every variant that real layers launch."""
    by_tile: dict[Tile, list[int]] = {}
    for capability in CAPABILITIES:
        by_tile.setdefault(choose_tile(capability), []).append(capability)
    return [
        _case(dtype, tile, tuple(capabilities), is_int8=is_int8, has_slopes=has_slopes)
        for tile, capabilities in by_tile.items()
        for dtype in ("fp16", "bf16")
        for is_int8 in (False, True)
        for has_slopes in (False, True)
    ]


def _case(
    dtype: str, tile: Tile, capabilities: tuple[int, ...], *, is_int8: bool, has_slopes: bool
) -> Case:
    pointers = ("rows_ptr", "counts_ptr", "contexts_ptr", "tiles_ptr")
    integers = ("num_heads", "num_kv_heads", "num_slots", "stride_query", "stride_table")
    return Case(
        name=f"paged_prefill S={tile.block_s} {dtype}{' int8' * is_int8}{' alibi' * has_slopes}",
        kernel=_prefill_kernel,
        types=cache_types(dtype, is_int8=is_int8) | {
            **dict.fromkeys(pointers, "*i32"), "out_ptr": f"*{dtype}",
            **dict.fromkeys(integers, "i32"), "scale": "fp32",
        },
        constants=cache_constants(
            CASE_HEAD_DIM, CASE_BLOCK_SIZE, has_scales=is_int8, has_slopes=has_slopes
        ) | {"BLOCK_M": tile.block_m, "BLOCK_S": tile.block_s},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        unaligned=frozenset({"num_heads", "num_kv_heads", "stride_table"}),
        capabilities=capabilities,
    )  # fmt: skip

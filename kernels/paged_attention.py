"""Attention over a paged KV cache, for a micro-batch that mixes decodes and chunks.

    out[t, h] = softmax_j((q[t, h] · k[j, g]) · scale + slope[h] · (j - p[t])) · v[j, g]    j ≤ p[t]

T tokens, H heads, H_kv KV heads, D head size, g = h // (H / H_kv), p the token's position in its
sequence. query and out [T, H · D] fp16 or bf16; the cache as in `paged_tiles`, 16-bit or int8.

- Chunks: `paged_prefill`.
- Decodes, one query token of a sequence: the bytes of keys and values are the bound, so each
  sequence's context is split among programs until all processors are busy, and a second kernel
  combines the parts in a fixed order: the same input gives the same bits.
  - A KV head of its own for each head: sums without tensor cores. Each row of a step keeps its own
    maximum, sum and weighted values, and they meet once, after the last step.
  - Grouped heads: all heads of a KV head in one program, as the rows of a matrix, padded to 16, so
    that keys and values are read once. Before capability 8.0, without tensor cores, each head is
    taken apart, and finds what its neighbours read in the L2 cache.

A step's keys and values are asked for together, 16 bytes a thread.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.attention_plan import AttentionPlan
from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case
from tightfit.kernels.paged_prefill import attend_chunks, attend_chunks_by_torch
from tightfit.kernels.paged_tiles import (
    CASE_BLOCK_SIZE,
    CASE_HEAD_DIM,
    HEAD_DIM_STEP,
    LOG2_E,
    MAX_HEAD_DIM,
    SUPPORTED_DTYPES,
    attend,
    cache_constants,
    cache_types,
    check_cache,
    find_slots,
    load_scales,
)
from tightfit.kernels.w8a16 import capability_of, has_tensor_cores

SUPPORTED_BLOCK_SIZES: Final = (8, 16, 32, 64)

MIN_ROWS: Final = 16
"""Of a matrix that tensor cores multiply."""

MIN_PROGRAMS: Final = {"sums": 4096, "grouped": 512}
"""Programs from which on contexts are not split: some for every processor of the largest chips.
Not measured yet."""

MIN_KEYS_PER_SPLIT: Final = 128
"""That a split has at least where its context is the longest, to be worth its part."""

COMBINE_BLOCK: Final = 16
"""Splits that are combined at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch for decodes is cut up."""

    block_g: int
    """Heads of a program, padded; 1 is the kernel without tensor cores."""
    block_s: int
    """Keys of a step."""
    splits: int
    """Parts of each context."""
    num_warps: int
    num_stages: int
    """Of the pipeline of loads."""


def choose_tile(
    num_decodes: int, max_context: int, num_heads: int, num_kv_heads: int, *, tensor_cores: bool
) -> Tile:
    """By the heads; the splits by the number of programs and the longest context."""
    if num_heads == num_kv_heads or not tensor_cores:
        block_g, block_s, num_warps, num_stages = 1, 16, 2, 1
        programs, wanted = num_decodes * num_heads, MIN_PROGRAMS["sums"]
    else:
        block_g = max(MIN_ROWS, int(triton.next_power_of_2(num_heads // num_kv_heads)))
        block_s, num_warps, num_stages = 64, 4, 2
        programs, wanted = num_decodes * num_kv_heads, MIN_PROGRAMS["grouped"]
    steps = max(1, triton.cdiv(max_context, block_s))
    splits = max(1, min(wanted // programs, max_context // MIN_KEYS_PER_SPLIT))
    splits = triton.cdiv(steps, triton.cdiv(steps, splits))  # none without a step
    return Tile(
        block_g=block_g,
        block_s=block_s,
        splits=splits,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@triton.jit  # type: ignore[untyped-decorator]
def _split_range(context, BLOCK_S: tl.constexpr):  # type: ignore[no-untyped-def]
    """The keys of the program's split, from and to; of a short context some splits have none."""
    size = tl.cdiv(tl.cdiv(context, BLOCK_S), tl.num_programs(1)) * BLOCK_S
    first = tl.program_id(1) * size
    return first, tl.minimum(first + size, context)


@triton.jit(do_not_specialize=["num_decodes", "stride_table"])  # type: ignore[untyped-decorator]
def _sums_kernel(  # type: ignore[no-untyped-def]
    query_ptr, cache_ptr, scales_ptr, slopes_ptr, tables_ptr,
    rows_ptr, contexts_ptr, out_ptr, best_ptr, total_ptr,
    num_decodes, num_heads, num_kv_heads, num_slots,
    stride_query, stride_table,
    scale,
    IS_SPLIT: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_SLOPES: tl.constexpr,
    LOWEST: tl.constexpr, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one decode, one split. out is [T, H, D]; or the parts of the splits: best and
    total [splits, decodes, H] fp32 and out, weighted values, [splits, decodes, H, D] fp32."""
    sequence, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    kv_head = head // (num_heads // num_kv_heads)
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < D
    q_ptrs = query_ptr + row * stride_query + head * D + dims
    q = tl.load(q_ptrs, mask=in_head, other=0.0).to(tl.float32) * scale
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head) * LOG2_E

    table_ptr = tables_ptr + sequence.to(tl.int64) * stride_table
    first_key = kv_head.to(tl.int64) * num_slots
    first_value = (kv_head + num_kv_heads).to(tl.int64) * num_slots
    best = tl.full((BLOCK_S,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_S,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    first, end = _split_range(context, BLOCK_S)
    for step in range(first, end, BLOCK_S):
        keys = step + tl.arange(0, BLOCK_S)
        in_range = keys < end
        slots = find_slots(table_ptr, keys, in_range, BLOCK_SIZE)
        offsets = slots[:, None] * D + dims[None, :]
        mask = in_range[:, None] & in_head[None, :]
        k = tl.load(cache_ptr + first_key * D + offsets, mask=mask, other=0)
        v = tl.load(cache_ptr + first_value * D + offsets, mask=mask, other=0)
        scores = tl.sum(k.to(tl.float32) * q[None, :], axis=1)
        if HAS_SCALES:
            scores *= load_scales(scales_ptr + first_key, slots, in_range)
        if HAS_SLOPES:
            scores += slope * (keys - (context - 1)).to(tl.float32)
        scores = tl.where(in_range, scores, float("-inf"))
        new_best = tl.maximum(best, scores)
        weights, shrink = tl.exp2(scores - new_best), tl.exp2(best - new_best)
        total = total * shrink + weights
        if HAS_SCALES:
            weights *= load_scales(scales_ptr + first_value, slots, in_range)
        acc = acc * shrink[:, None] + weights[:, None] * v.to(tl.float32)
        best = new_best

    greatest = tl.max(best, axis=0)
    shrink = tl.exp2(best - greatest)
    total_of_all = tl.sum(total * shrink, axis=0)
    out = tl.sum(acc * shrink[:, None], axis=0)
    if IS_SPLIT:
        part = tl.program_id(1).to(tl.int64) * num_decodes * num_heads + tl.program_id(0)
        tl.store(best_ptr + part, greatest)
        tl.store(total_ptr + part, total_of_all)
        out_ptr += part * D
    else:
        out /= tl.where(total_of_all == 0.0, 1.0, total_of_all)  # of no keys: 0
        out_ptr += (row * num_heads + head) * D
    tl.store(out_ptr + dims, out.to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit(do_not_specialize=["num_decodes", "stride_table"])  # type: ignore[untyped-decorator]
def _grouped_kernel(  # type: ignore[no-untyped-def]
    query_ptr, cache_ptr, scales_ptr, slopes_ptr, tables_ptr,
    rows_ptr, contexts_ptr, out_ptr, best_ptr, total_ptr,
    num_decodes, num_heads, num_kv_heads, num_slots,
    stride_query, stride_table,
    scale,
    IS_SPLIT: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_SLOPES: tl.constexpr,
    LOWEST: tl.constexpr, LOG2_E: tl.constexpr,
    D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """All heads of one KV head of one decode, one split; otherwise as `_sums_kernel`."""
    sequence, kv_head = tl.program_id(0) // num_kv_heads, tl.program_id(0) % num_kv_heads
    group = num_heads // num_kv_heads
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    context = tl.load(contexts_ptr + sequence)
    members = tl.arange(0, BLOCK_G)
    heads = kv_head * group + members
    is_head = members < group
    dims = tl.arange(0, BLOCK_D)
    mask = is_head[:, None] & (dims < D)[None, :]
    q_ptrs = query_ptr + row * stride_query + heads[:, None] * D + dims[None, :]
    q = tl.load(q_ptrs, mask=mask, other=0.0)
    slopes = tl.zeros((BLOCK_G,), dtype=tl.float32)
    if HAS_SLOPES:
        slopes += tl.load(slopes_ptr + heads, mask=is_head, other=0.0) * LOG2_E

    first_key = kv_head.to(tl.int64) * num_slots
    first_value = (kv_head + num_kv_heads).to(tl.int64) * num_slots
    first, end = _split_range(context, BLOCK_S)
    best, total, acc = attend(
        q, tl.full((BLOCK_G,), context - 1, dtype=tl.int32), slopes,
        tl.full((BLOCK_G,), LOWEST, dtype=tl.float32),
        tl.zeros((BLOCK_G,), dtype=tl.float32),
        tl.zeros((BLOCK_G, BLOCK_D), dtype=tl.float32),
        tables_ptr + sequence.to(tl.int64) * stride_table,
        cache_ptr + first_key * D, cache_ptr + first_value * D,
        scales_ptr + first_key, scales_ptr + first_value,
        first, end, scale,
        True, HAS_SCALES, HAS_SLOPES, D, BLOCK_SIZE, BLOCK_S, BLOCK_D,
    )  # fmt: skip
    if IS_SPLIT:
        parts = (tl.program_id(1).to(tl.int64) * num_decodes + sequence) * num_heads + heads
        tl.store(best_ptr + parts, best, mask=is_head)
        tl.store(total_ptr + parts, total, mask=is_head)
    else:
        parts = row * num_heads + heads
        acc /= tl.where(total == 0.0, 1.0, total)[:, None]  # of no keys: 0
    out_ptrs = out_ptr + parts[:, None] * D + dims[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_decodes", "splits"])  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    parts_ptr, best_ptr, total_ptr, rows_ptr, out_ptr,
    num_decodes, num_heads, splits,
    LOWEST: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One head of one decode: its row of out [T, H, D] of the splits' parts, first to last."""
    sequence, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < D
    best = tl.full((), LOWEST, dtype=tl.float32)
    total = tl.zeros((), dtype=tl.float32)
    acc = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(0, splits, BLOCK):
        split = first + tl.arange(0, BLOCK)
        is_split = split < splits
        parts = split.to(tl.int64) * num_decodes * num_heads + tl.program_id(0)
        split_best = tl.load(best_ptr + parts, mask=is_split, other=LOWEST)
        split_total = tl.load(total_ptr + parts, mask=is_split, other=0.0)
        mask = is_split[:, None] & in_head[None, :]
        values = tl.load(parts_ptr + parts[:, None] * D + dims[None, :], mask=mask, other=0.0)
        new_best = tl.maximum(best, tl.max(split_best, axis=0))
        weights, shrink = tl.exp2(split_best - new_best), tl.exp2(best - new_best)
        total = total * shrink + tl.sum(split_total * weights, axis=0)
        acc = acc * shrink + tl.sum(values * weights[:, None], axis=0)
        best = new_best
    out = acc / tl.where(total == 0.0, 1.0, total)  # of no keys: 0
    row = tl.load(rows_ptr + sequence).to(tl.int64)
    out_ptrs = out_ptr + (row * num_heads + head) * D + dims
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_head)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    plan: AttentionPlan,
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    softmax_scale: float,
    slopes: Tensor | None = None,
    capability: int | None = None,
) -> Tensor:
    """Every token's attention on its sequence's cache; see `reference.paged_attention`.

    The keys and values of the micro-batch itself must be in the cache already (`write_kv`).

    Args:
        query: [T, H · D] fp16 or bf16, already rotated where the model rotates; rows may be a slice
            of wider ones.
        cache: of one layer, [2 · KV heads, slots, D] contiguous, query's dtype or int8.
        scales: [2 · KV heads, slots] bf16, contiguous, with an int8 cache; else None.
        plan: of the micro-batch, on query's device.
        num_kv_heads: divides H.
        head_dim: a multiple of 16, at most 128.
        block_size: tokens of a block: 8, 16, 32 or 64.
        softmax_scale: of the scores.
        slopes: [H] fp32, ALiBi's; or None.
        capability: of query's device × 10; asked of torch if None.
    Returns:
        [T, H · D], contiguous, dtype of query. The same input gives the same bits. Rows of a fixed
        plan that no sequence took are 0.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    _check(query, cache, scales, plan, num_kv_heads, head_dim, block_size, slopes)
    query = query if query.stride(1) == 1 else query.contiguous()
    out = query.new_empty(query.shape)
    sizes: dict[str, Any] = {
        "num_kv_heads": num_kv_heads, "head_dim": head_dim, "block_size": block_size,
        "softmax_scale": softmax_scale, "slopes": slopes,
    }  # fmt: skip
    capability = capability_of(query.device, capability)
    tensor_cores = has_tensor_cores(query.device, capability)
    if plan.num_decodes:
        _attend_decodes(query, cache, scales, plan, out, tensor_cores=tensor_cores, **sizes)
    if plan.chunks and tensor_cores:
        attend_chunks(query, cache, scales, plan, out, capability=capability, **sizes)
    elif plan.chunks:
        attend_chunks_by_torch(query, cache, scales, plan, out, **sizes)
    return out


def _attend_decodes(
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
    tensor_cores: bool,
) -> None:
    """The plan's decodes into their rows of out."""
    num_heads, num_decodes = query.shape[1] // head_dim, plan.num_decodes
    tile = choose_tile(
        num_decodes, plan.max_context, num_heads, num_kv_heads, tensor_cores=tensor_cores
    )
    is_split, is_grouped = tile.splits > 1, tile.block_g > 1
    constants = cache_constants(
        head_dim, block_size, has_scales=scales is not None, has_slopes=slopes is not None
    )
    parts, best, total = out, out, out
    if is_split:
        shape = (tile.splits, num_decodes, num_heads)
        parts = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        best, total = torch.empty((2, *shape), dtype=torch.float32, device=query.device)
    programs = num_decodes * (num_kv_heads if is_grouped else num_heads)
    # A pointer that is not read stands where one is wanted.
    (_grouped_kernel if is_grouped else _sums_kernel)[(programs, tile.splits)](
        query, cache, cache if scales is None else scales.view(torch.int16),
        query if slopes is None else slopes, plan.tables,
        plan.rows, plan.contexts, parts, best, total,
        num_decodes, num_heads, num_kv_heads, cache.shape[1],
        query.stride(0), plan.tables.stride(0),
        softmax_scale * LOG2_E,
        IS_SPLIT=is_split, **constants, **_block_constants(tile),
        num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=True,
    )  # fmt: skip
    if is_split:
        _combine_kernel[(num_decodes * num_heads,)](
            parts, best, total, plan.rows, out,
            num_decodes, num_heads, tile.splits,
            **{name: constants[name] for name in ("LOWEST", "D", "BLOCK_D")}, BLOCK=COMBINE_BLOCK,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _block_constants(tile: Tile) -> dict[str, Any]:
    blocks = {"BLOCK_S": tile.block_s}
    return blocks if tile.block_g == 1 else blocks | {"BLOCK_G": tile.block_g}


def _check(
    query: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    plan: AttentionPlan,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    slopes: Tensor | None,
) -> None:
    if head_dim % HEAD_DIM_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be 16, 32, … or {MAX_HEAD_DIM}, got {head_dim}")
    if block_size not in SUPPORTED_BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {SUPPORTED_BLOCK_SIZES}, got {block_size}")
    if (
        query.ndim != 2
        or query.shape[0] != plan.num_tokens
        or query.shape[1] % (num_kv_heads * head_dim)
        or query.dtype not in SUPPORTED_DTYPES
    ):
        raise ValueError(
            f"query must be [{plan.num_tokens}, a multiple of {num_kv_heads} KV heads · {head_dim}]"
            f" in one of {SUPPORTED_DTYPES}, got {list(query.shape)} {query.dtype}"
        )
    check_cache(cache, scales, num_kv_heads, head_dim, query.dtype)
    if cache.shape[1] % block_size:
        raise ValueError(f"{cache.shape[1]} slots are no whole blocks of {block_size}")
    num_heads = query.shape[1] // head_dim
    if slopes is not None and (
        slopes.shape != (num_heads,)
        or slopes.dtype is not torch.float32
        or not slopes.is_contiguous()
    ):
        raise ValueError(
            f"slopes must be [{num_heads}] float32 and contiguous, got {list(slopes.shape)} "
            f"{slopes.dtype}"
        )


CASE_GROUP: Final = 8
"""Heads of a KV head in Llama-like models."""


def compile_cases() -> list[Case]:
    """Every variant that real layers launch: BLOOM-176B and OPT-175B have no groups, BLOOM has
    slopes, Llama-like models have groups."""
    return [case for dtype in ("fp16", "bf16") for case in _cases(dtype)]


def _cases(dtype: str) -> Iterator[Case]:
    capabilities = (*OLD_CAPABILITIES, *CAPABILITIES) if dtype == "fp16" else CAPABILITIES
    constants = cache_constants(CASE_HEAD_DIM, CASE_BLOCK_SIZE, has_scales=False, has_slopes=False)
    yield Case(
        name=f"paged_attention combine {dtype}",
        kernel=_combine_kernel,
        types={
            **dict.fromkeys(("parts_ptr", "best_ptr", "total_ptr"), "*fp32"), "rows_ptr": "*i32",
            "out_ptr": f"*{dtype}",
            **dict.fromkeys(("num_decodes", "num_heads", "splits"), "i32"),
        },
        constants={name: constants[name] for name in ("LOWEST", "D", "BLOCK_D")} | {
            "BLOCK": COMBINE_BLOCK,
        },
        unaligned=frozenset({"num_decodes", "num_heads", "splits"}),
        has_dot=False,
        capabilities=capabilities,
    )  # fmt: skip
    for is_split in (False, True):
        for is_int8 in (False, True):
            for group, has_slopes in ((1, False), (1, True), (CASE_GROUP, False)):
                tile = choose_tile(1, 1, group, 1, tensor_cores=True)
                is_grouped = tile.block_g > 1
                yield Case(
                    name=f"paged_attention {'grouped' if is_grouped else 'sums'} {dtype}"
                    f"{' int8' * is_int8}{' alibi' * has_slopes}{' split' * is_split}",
                    kernel=_grouped_kernel if is_grouped else _sums_kernel,
                    types=_types(dtype, is_int8=is_int8, is_split=is_split),
                    constants=cache_constants(
                        CASE_HEAD_DIM, CASE_BLOCK_SIZE, has_scales=is_int8, has_slopes=has_slopes
                    ) | {"IS_SPLIT": is_split, **_block_constants(tile)},
                    num_warps=tile.num_warps,
                    num_stages=tile.num_stages,
                    unaligned=frozenset(
                        {"num_decodes", "num_heads", "num_kv_heads", "stride_table"}
                    ),
                    has_dot=is_grouped,
                    capabilities=CAPABILITIES if is_grouped else capabilities,
                )  # fmt: skip


def _types(dtype: str, *, is_int8: bool, is_split: bool) -> dict[str, str]:
    out = "*fp32" if is_split else f"*{dtype}"
    integers = (
        "num_decodes", "num_heads", "num_kv_heads", "num_slots", "stride_query", "stride_table",
    )  # fmt: skip
    return cache_types(dtype, is_int8=is_int8) | {
        "rows_ptr": "*i32", "contexts_ptr": "*i32", "out_ptr": out, "best_ptr": out,
        "total_ptr": out, **dict.fromkeys(integers, "i32"), "scale": "fp32",
    }  # fmt: skip

"""Which rows of a micro-batch attend to which blocks of the KV cache: built once, read by all
layers.

B sequences, T query tokens. The numbers lie in one int32 tensor on the device, so that building a
plan is one copy, and so is refilling one that a CUDA graph reads (`AttentionPlan.refill`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

QUERIES_PER_TILE: Final = 64
"""Query tokens of one program of the kernel for chunks."""

ALIGNED_INTEGERS: Final = 4
"""Every part starts at a multiple of 16 bytes, as kernels are compiled for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Several query tokens of one sequence, as the host knows them."""

    sequence: int
    """Index in the plan, which has the decodes first."""
    row: int
    """First row in the micro-batch."""
    num_tokens: int
    context: int
    """Tokens of the sequence up to the last of these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """A micro-batch for `paged_attention`: sequences of one query token (decodes) come first."""

    packed: Tensor
    """int32: all that follows on the device."""
    tables: Tensor
    """[B, max_blocks] int32, block tables, padded with 0."""
    rows: Tensor
    """[B] int32, each sequence's first row in the micro-batch."""
    counts: Tensor
    """[B] int32, its query tokens."""
    contexts: Tensor
    """[B] int32, its tokens up to the last of these; 0 for a place that is not taken."""
    tiles: Tensor
    """[num_tiles, 2] int32: a chunk's sequence, and the first of its query tokens that the tile
    takes; those with most keys first."""
    num_tokens: int
    """T."""
    num_decodes: int
    max_context: int
    """Longest context of a decode that the plan may hold."""
    chunks: tuple[Chunk, ...]

    def refill(self, other: AttentionPlan) -> None:
        """Take the numbers of another plan, in place: a captured graph computes with them.

        Raises:
            ValueError: the other plan has chunks, or another shape.
        """
        if self.chunks or other.chunks or _shape(self) != _shape(other):
            raise ValueError(
                f"a plan of {_shape(self)} (tokens, decodes, longest context, table) and "
                f"{len(self.chunks)} chunks cannot take one of {_shape(other)} and "
                f"{len(other.chunks)} chunks: build both with the same fixed sizes"
            )
        self.packed.copy_(other.packed, non_blocking=True)


def _shape(plan: AttentionPlan) -> tuple[int, int, int, tuple[int, ...]]:
    return plan.num_tokens, plan.num_decodes, plan.max_context, tuple(plan.tables.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class FixedSizes:
    """Of a plan that a CUDA graph is captured with: one decode for each row."""

    num_tokens: int
    """T, and B: rows past the given sequences are padding, and their results 0."""
    max_context: int
    """Longest context; with the block size it also fixes the width of the table."""


def plan_attention(
    block_tables: Sequence[Sequence[int]],
    counts: Sequence[int],
    contexts: Sequence[int],
    *,
    block_size: int,
    device: torch.device | str,
    fixed: FixedSizes | None = None,
) -> AttentionPlan:
    """The plan of a micro-batch whose rows are the sequences' query tokens, one after another.

    Args:
        block_tables: of each sequence its blocks in order; more than the context needs is allowed.
        counts: of each the number of query tokens, at least 1.
        contexts: of each the number of tokens up to the last of these.
        block_size: tokens of a block.
        device: of the KV cache.
        fixed: the sizes to build the plan with, for a graph; None: what the micro-batch needs.
    Raises:
        ValueError: lengths that do not agree, a table that does not cover its context, or what
            does not fit the fixed sizes.
    """
    _check(block_tables, counts, contexts, block_size)
    firsts = [sum(counts[:index]) for index in range(len(counts))]
    order = sorted(range(len(counts)), key=lambda index: counts[index] > 1)  # stable
    num_decodes = sum(count == 1 for count in counts)
    chunks = tuple(
        Chunk(sequence=place, row=firsts[i], num_tokens=counts[i], context=contexts[i])
        for place, i in enumerate(order)
        if counts[i] > 1
    )
    rows = [firsts[i] for i in order]
    num_tokens, max_context = (
        sum(counts),
        max((contexts[i] for i in order[:num_decodes]), default=0),
    )
    num_blocks = [-(-contexts[i] // block_size) for i in order]
    width = max(num_blocks, default=0)
    if fixed is not None:
        if chunks or num_tokens > fixed.num_tokens or max_context > fixed.max_context:
            raise ValueError(
                f"{num_tokens} tokens of {len(counts)} sequences, decodes with up to {max_context} "
                f"of context, do not fit a plan of {fixed.num_tokens} decodes with "
                f"{fixed.max_context}"
            )
        rows += range(num_tokens, fixed.num_tokens)
        num_tokens = num_decodes = fixed.num_tokens
        max_context, width = fixed.max_context, -(-fixed.max_context // block_size)
    padding = [0] * (len(rows) - len(order))
    table = [
        [*block_tables[i][:needed], *[0] * (width - needed)]
        for i, needed in zip(order, num_blocks, strict=True)
    ]
    parts: list[tuple[list[int], tuple[int, ...]]] = [
        ([block for line in table for block in line] + padding * width, (len(rows), width)),
        (rows, (len(rows),)),
        ([counts[i] for i in order] + padding, (len(rows),)),
        ([contexts[i] for i in order] + padding, (len(rows),)),
        *_tiles(chunks),
    ]
    packed, views = _pack(parts, torch.device(device))
    tables, row_view, count_view, context_view, tiles = views
    return AttentionPlan(
        packed=packed,
        tables=tables,
        rows=row_view,
        counts=count_view,
        contexts=context_view,
        tiles=tiles,
        num_tokens=num_tokens,
        num_decodes=num_decodes,
        max_context=max_context,
        chunks=chunks,
    )


def _check(
    block_tables: Sequence[Sequence[int]],
    counts: Sequence[int],
    contexts: Sequence[int],
    block_size: int,
) -> None:
    if not len(block_tables) == len(counts) == len(contexts):
        raise ValueError(
            f"block tables, counts and contexts must be of the same sequences, got "
            f"{len(block_tables)}, {len(counts)} and {len(contexts)}"
        )
    for index, (table, count, context) in enumerate(
        zip(block_tables, counts, contexts, strict=True)
    ):
        if not 1 <= count <= context or len(table) * block_size < context:
            raise ValueError(
                f"sequence {index}: {count} query tokens at the end of {context} and "
                f"{len(table)} blocks of {block_size}: there must be at least one token, and "
                f"blocks for all"
            )


def _tiles(chunks: tuple[Chunk, ...]) -> list[tuple[list[int], tuple[int, ...]]]:
    """Those with most keys first: a short one last leaves no processor waiting for long."""
    tiles = [
        (chunk.context - chunk.num_tokens + first, chunk.sequence, first)
        for chunk in chunks
        for first in range(0, chunk.num_tokens, QUERIES_PER_TILE)
    ]
    tiles.sort(key=lambda tile: -tile[0])
    return [([number for tile in tiles for number in tile[1:]], (len(tiles), 2))]


def _pack(
    parts: Sequence[tuple[list[int], tuple[int, ...]]], device: torch.device
) -> tuple[Tensor, list[Tensor]]:
    """One tensor on the device, and a view of it for each part's shape."""
    numbers: list[int] = []
    starts = []
    for part, _ in parts:
        starts.append(len(numbers))
        numbers += part
        numbers += [0] * (-len(numbers) % ALIGNED_INTEGERS)
    host = torch.tensor(numbers, dtype=torch.int32)
    if device.type == "cuda":
        host = host.pin_memory()
    packed = host.to(device, non_blocking=True)
    views = [
        packed[start : start + len(part)].view(shape)
        for start, (part, shape) in zip(starts, parts, strict=True)
    ]
    return packed, views

"""A micro-batch as tensors, built once per step for all layers. T tokens, B sequences, S
context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.kernels.attention_plan import AttentionPlan, FixedSizes, plan_attention
from tightfit.workers.api import MicroBatch, SequenceSlice
from tightfit.workers.decoder_config import DecoderConfig, Position
from tightfit.workers.errors import StageError
from tightfit.workers.kv_cache import gather_rows
from tightfit.workers.positions import alibi_slopes, rotary_frequencies, rotary_rows
from tightfit.workers.workspace import GATHER_ELEMENTS

PADDING_LIMIT = 2
"""Decodes share one gather while the longest context is at most this times the shortest."""

FUSED_KEYS_LIMIT = 2048
"""Most keys (KV heads · context) for which torch's fused attention is the faster for one token of
one sequence, and only with grouped heads: it takes about 45 ns a key, and more when one query
stands alone; batched products take 30 µs, and a tenth of that a key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedGroup:
    """Queries of one sequence for torch's fused attention: a prefill chunk, or a short decode."""

    rows: slice
    """Which rows of the micro-batch."""
    num_queries: int
    context: int
    """S, these tokens included."""
    first_slot: int | None
    """Set when the sequence's blocks lie in a row in memory: no gather is needed."""
    blocks: Tensor
    """[2, KV heads, blocks] int64, as `kv_cache.gather_rows` makes them."""
    mask: Tensor | None
    """Additive, [1, 1 or KV heads, heads per KV head · queries, S]; None: everything is visible."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePart:
    """Pairs of a sequence and a KV head whose keys and values are gathered together."""

    pairs: slice
    """Which pairs of the group."""
    blocks: Tensor
    """[2, P, blocks each] int64, tables padded with block 0."""
    mask: Tensor
    """Additive, fp32 [P, 1 or queries per pair, S], S a multiple of the block size."""
    fused: bool
    """Compute with torch's fused attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """One token each of some sequences of similar context, in batched matrix products.

    The heads that share a KV head stand where queries stand, so that nothing is repeated.
    """

    rows: slice | Tensor
    """Which rows of the micro-batch, in order."""
    parts: tuple[DecodePart, ...]


AttentionGroup = FusedGroup | DecodeGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchInputs:
    """What every layer needs of a micro-batch."""

    token_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64."""
    slots: Tensor
    """[T] int64: where each token's keys and values go."""
    cos: Tensor | None
    sin: Tensor | None
    """Rotary models: [T, 1, D]."""
    groups: tuple[AttentionGroup, ...] = ()
    """On a CPU."""
    plan: AttentionPlan | None = None
    """On a GPU."""


class BatchBuilder:
    """Builds the inputs of micro-batches for one shard.

    Args:
        config: the model.
        dtype: of hidden states.
        block_size, num_blocks: of the KV cache.
        device: torch device name.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        dtype: torch.dtype,
        block_size: int,
        num_blocks: int,
        device: str = "cpu",
    ) -> None:
        self._config, self._dtype, self._device = config, dtype, device
        self._is_gpu = device != "cpu"
        self._block_size, self._num_blocks = block_size, num_blocks
        self._is_grouped = config.num_kv_heads < config.num_heads
        self._slopes = alibi_slopes(config.num_heads) if config.position is Position.ALIBI else None
        self._frequencies = (
            rotary_frequencies(config.rope, config.head_dim).to(device) if config.rope else None
        )

    def numbers(self, batch: MicroBatch) -> Tensor:
        """Token ids, positions and slots, [3, T] int64 on the device: in one piece, as a GPU takes
        it faster than three.

        Raises:
            StageError: a block table that does not cover its tokens or names no such block.
        """
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        for part in batch.slices:
            self._check(part)
            token_ids += part.token_ids
            span = range(part.start_position, part.start_position + len(part.token_ids))
            positions += span
            size, table = self._block_size, part.block_table
            slots += [table[p // size] * size + p % size for p in span]
        return torch.tensor([token_ids, positions, slots]).to(self._device)

    def build(self, batch: MicroBatch, numbers: Tensor) -> BatchInputs:
        """See `BatchInputs`.

        Args:
            batch: the micro-batch.
            numbers: its own.
        """
        token_ids, positions, slots = numbers
        cos, sin = self.rotary(positions)
        return BatchInputs(
            token_ids=token_ids,
            positions=positions,
            slots=slots,
            cos=cos,
            sin=sin,
            groups=() if self._is_gpu else self._groups(batch),
            plan=self.plan(batch.slices) if self._is_gpu else None,
        )

    def _groups(self, batch: MicroBatch) -> tuple[AttentionGroup, ...]:
        decodes: list[tuple[int, SequenceSlice]] = []
        groups: list[AttentionGroup] = []
        row = 0
        for part in batch.slices:
            if len(part.token_ids) == 1:
                decodes.append((row, part))
            else:
                groups.append(self._fused(row, part))
            row += len(part.token_ids)
        return (*groups, *self._decode_groups(decodes))

    def plan(
        self, slices: Sequence[SequenceSlice], fixed: FixedSizes | None = None
    ) -> AttentionPlan:
        """A GPU's; `fixed`: the sizes of a captured graph."""
        return plan_attention(
            [part.block_table for part in slices],
            [len(part.token_ids) for part in slices],
            [part.start_position + len(part.token_ids) for part in slices],
            block_size=self._block_size,
            device=self._device,
            fixed=fixed,
        )

    def _check(self, part: SequenceSlice) -> None:
        end = part.start_position + len(part.token_ids)
        if not part.token_ids or len(part.block_table) * self._block_size < end:
            raise StageError(
                f"sequence {part.sequence_id}: {len(part.block_table)} KV blocks of "
                f"{self._block_size} do not cover positions {part.start_position} to {end - 1}"
            )
        if max(part.block_table) >= self._num_blocks or min(part.block_table) < 0:
            raise StageError(
                f"sequence {part.sequence_id}: block table {part.block_table} names a block that "
                f"this stage does not have (0 to {self._num_blocks - 1})"
            )

    def rotary(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of positions [T]: cos and sin as `BatchInputs` has them."""
        if self._frequencies is None or self._config.rope is None:
            return None, None
        return rotary_rows(
            self._frequencies, positions, self._config.rope.attention_factor, self._dtype
        )

    def _fused(self, row: int, part: SequenceSlice) -> FusedGroup:
        num, start = len(part.token_ids), part.start_position
        context = start + num
        table = part.block_table[: -(-context // self._block_size)]
        return FusedGroup(
            rows=slice(row, row + num),
            num_queries=num,
            context=context,
            first_slot=self._first_slot(table),
            blocks=self._gather_rows([table]),
            mask=None if num == 1 and self._slopes is None else self._chunk_mask(start, num),
        )

    def _gather_rows(self, tables: list[list[int]]) -> Tensor:
        return gather_rows(
            torch.tensor(tables),
            num_kv_heads=self._config.num_kv_heads,
            num_blocks=self._num_blocks,
        )

    def _chunk_mask(self, start: int, num: int) -> Tensor:
        """[1, 1 or KV heads, heads per KV head · num, S]: causal from `start` on, with ALiBi's bias
        where there is one."""
        config = self._config
        distance = torch.arange(start + num)[None] - torch.arange(start, start + num)[:, None]
        bias = torch.zeros(distance.shape).masked_fill_(distance > 0, float("-inf"))
        if self._slopes is None:
            repeats = config.num_heads // config.num_kv_heads
            return bias.to(self._dtype).repeat(repeats, 1)[None, None]
        # Head by head: all heads at once would be as large again, in fp32.
        mask = torch.empty((config.num_heads, *distance.shape), dtype=self._dtype)
        for head, slope in zip(mask, self._slopes.tolist(), strict=True):
            head.copy_(torch.add(bias, distance, alpha=slope))
        return mask.view(1, config.num_kv_heads, -1, distance.shape[1])

    def _first_slot(self, table: Sequence[int]) -> int | None:
        first = table[0]
        if table[-1] - first == len(table) - 1 and all(
            block == first + i for i, block in enumerate(table)
        ):
            return first * self._block_size
        return None

    def _decode_groups(self, decodes: list[tuple[int, SequenceSlice]]) -> list[AttentionGroup]:
        """Decodes of similar context share a call; padding never doubles the work."""
        if len(decodes) == 1 and self._is_grouped:
            row, part = decodes[0]
            if self._config.num_kv_heads * (part.start_position + 1) <= FUSED_KEYS_LIMIT:
                return [self._fused(row, part)]
        groups: list[AttentionGroup] = []
        by_length = sorted(decodes, key=lambda decode: -decode[1].start_position)
        while by_length:
            longest = by_length[0][1].start_position + 1
            members = [d for d in by_length if (d[1].start_position + 1) * PADDING_LIMIT >= longest]
            by_length = by_length[len(members) :]
            groups.append(self._decode_group(sorted(members, key=lambda d: d[0]), longest))
        return groups

    def _decode_group(self, members: list[tuple[int, SequenceSlice]], context: int) -> DecodeGroup:
        num_blocks = -(-context // self._block_size)
        tables = [part.block_table[:num_blocks] for _, part in members]
        first_row, count = members[0][0], len(members)
        rows: slice | Tensor
        if members[-1][0] - first_row == count - 1:
            rows = slice(first_row, first_row + count)
        else:
            rows = torch.tensor([row for row, _ in members])
        blocks = self._gather_rows([t + [0] * (num_blocks - len(t)) for t in tables])
        padded = num_blocks * self._block_size
        mask = self._decode_mask([part.start_position for _, part in members], padded)
        most = max(1, GATHER_ELEMENTS // (2 * padded * self._config.head_dim))
        num_parts = -(-blocks.shape[1] // most)
        step = -(-blocks.shape[1] // num_parts)
        fused = self._is_grouped and blocks.shape[1] * padded <= FUSED_KEYS_LIMIT
        return DecodeGroup(
            rows=rows,
            parts=tuple(
                DecodePart(
                    pairs=slice(first, first + step),
                    blocks=blocks[:, first : first + step].contiguous(),
                    mask=mask[first : first + step],
                    fused=fused,
                )
                for first in range(0, blocks.shape[1], step)
            ),
        )

    def _decode_mask(self, positions: list[int], padded: int) -> Tensor:
        """fp32 [pairs, 1 or queries per pair, S]: what lies after a position is hidden."""
        distance = torch.arange(padded)[None] - torch.tensor(positions)[:, None]  # [B, S]
        bias = torch.zeros(distance.shape).masked_fill_(distance > 0, float("-inf"))
        kv_heads = self._config.num_kv_heads
        if self._slopes is None:
            return bias.repeat_interleave(kv_heads, dim=0)[:, None]
        biased = self._slopes[None, :, None] * distance[:, None]  # [B, H, S]
        biased += bias[:, None]  # in place: it is the largest tensor of a step
        return biased.view(len(positions) * kv_heads, -1, padded)

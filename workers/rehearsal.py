"""The largest micro-batches that a stage can be given, to be tried before any is."""

from __future__ import annotations

from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice, StageSpec
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.workspace import MAX_LOGIT_ROWS

SAMPLING = SamplingSpec(temperature=1.0, top_p=0.9, num_logprobs=1)
"""Draws with what takes most memory, but penalties, which want a history."""


def largest_batches(config: DecoderConfig, spec: StageSpec, num_blocks: int) -> list[MicroBatch]:
    """A chunk that ends where the longest context does, and as many decodes there as can be.

    All sequences share the same blocks, which need not hold anything, in an order that has them
    gathered.
    """
    longest = min(spec.max_context or config.max_position, config.max_position)
    context = min(longest, num_blocks * spec.block_size)
    table = list(range(-(-context // spec.block_size)))[::-1]
    chunks: list[SequenceSlice] = []
    left = spec.max_batch_tokens
    while left > 0:
        chunks.append(_slice(len(chunks), table, context, min(left, context)))
        left -= context
    num_decodes = min(spec.max_sequences or spec.max_batch_tokens, spec.max_batch_tokens)
    decodes = [_slice(i, table, context, 1) for i in range(num_decodes)]
    return [MicroBatch(epoch=0, step=0, slices=slices) for slices in (chunks, decodes)]


def _slice(index: int, table: list[int], context: int, num_tokens: int) -> SequenceSlice:
    return SequenceSlice(
        sequence_id=index,
        start_position=context - num_tokens,
        token_ids=[0] * num_tokens,
        block_table=table,
        sampling=SAMPLING if index < MAX_LOGIT_ROWS else None,
    )

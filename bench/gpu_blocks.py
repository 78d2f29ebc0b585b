"""Some blocks as wide as BLOOM-176B's through two stages on one GPU.

The stages are those that serve: hidden states go from one to the other as bytes. Their layers name
one stored block (`wide_models`), so that a stage holds one, and reads it once for each layer.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import wide_models

from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice, StageSpec, StepResult
from tightfit.workers.link import StepMessage
from tightfit.workers.stage import Stage

DEPTHS = (4, 12)
"""Layers: two numbers of them tell a layer's time from that of stages, hops and head."""
VOCABULARY, BLOCK_SIZE = 4096, 16
PROMPT_TOKENS, DECODE_STEPS, WARM_STEPS = 512, 24, 4
SEED = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """What one format came to."""

    layers: int
    format: str
    kv_format: str
    num_sequences: int
    prefill_ms: float
    """Of 512 tokens, all layers, both stages, kernels compiled."""
    decode_ms: float
    """Of one step, all layers, both stages and the bytes between them: median."""
    held_bytes: int
    """Weights and KV cache of both stages, as predicted."""
    workspace_bytes: int
    """What both may need besides, as predicted."""
    measured_bytes: int
    """What the allocator has given out when both have loaded."""
    tokens: tuple[int, ...]
    """Of the first sequence."""


def save(path: Path, layers: int) -> None:
    """The checkpoint, in bf16."""
    config = wide_models.resized(wide_models.BLOOM_176B, layers=layers, vocab_size=VOCABULARY)
    wide_models.save_source(path, config)


class _Pipeline:
    def __init__(self, path: Path, layers: int, fmt: str, kv_format: str, num_blocks: int) -> None:
        half = layers // 2
        self.stages = [
            Stage(
                StageSpec(
                    model_path=str(path), stage_index=i, num_stages=2, first_layer=i * half,
                    end_layer=(i + 1) * half, format=fmt, head_format="int8", kv_format=kv_format,
                    device="cuda", num_kv_blocks=num_blocks,
                )
            )
            for i in range(2)
        ]  # fmt: skip
        self._step = 0

    def run(self, slices: list[SequenceSlice]) -> tuple[StepResult, float]:
        """One micro-batch; its result, and seconds."""
        started = time.perf_counter()
        batch = MicroBatch(epoch=0, step=self._step, slices=slices)
        message: StepMessage | StepResult = StepMessage(batch=batch)
        payload: memoryview | bytes = b""
        for stage in self.stages:
            assert isinstance(message, StepMessage)
            message, payload = stage.compute(message, memoryview(payload))
        self._step += 1
        assert isinstance(message, StepResult)
        return message, time.perf_counter() - started


def run(path: Path, layers: int, fmt: str, kv_format: str, num_sequences: int) -> Blocks:
    """Prefill each sequence, then decode all of them together."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    length = PROMPT_TOKENS + WARM_STEPS + DECODE_STEPS
    per_sequence = -(-length // BLOCK_SIZE)
    pipeline = _Pipeline(path, layers, fmt, kv_format, num_sequences * per_sequence)
    gc.collect()
    measured = torch.cuda.memory_allocated() - before
    memories = [stage.memory() for stage in pipeline.stages]
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(VOCABULARY, (num_sequences, PROMPT_TOKENS), generator=generator)
    tables = [list(range(i * per_sequence, (i + 1) * per_sequence)) for i in range(num_sequences)]
    pipeline.run([_slice(0, tables[0], 0, prompts[0].tolist())])  # compiles
    newest, prefills = [], []
    for i, prompt in enumerate(prompts.tolist()):
        result, seconds = pipeline.run([_slice(i, tables[i], 0, prompt)])
        newest.append(result.tokens[0].token_id)
        prefills.append(seconds)
    tokens, times = [newest[0]], []
    for step in range(WARM_STEPS + DECODE_STEPS - 1):
        position = PROMPT_TOKENS + step
        result, seconds = pipeline.run(
            [_slice(i, tables[i], position, [newest[i]]) for i in range(num_sequences)]
        )
        newest = [token.token_id for token in result.tokens]
        tokens.append(newest[0])
        if step >= WARM_STEPS:
            times.append(seconds)
    return Blocks(
        layers=layers,
        format=fmt,
        kv_format=kv_format,
        num_sequences=num_sequences,
        prefill_ms=min(prefills) * 1e3,
        decode_ms=statistics.median(times) * 1e3,
        held_bytes=sum(m.predicted_weight_bytes + m.kv_cache_bytes for m in memories),
        workspace_bytes=sum(m.workspace_bytes for m in memories),
        measured_bytes=measured,
        tokens=tuple(tokens),
    )


def _slice(i: int, table: list[int], start: int, token_ids: list[int]) -> SequenceSlice:
    used = -(-(start + len(token_ids)) // BLOCK_SIZE)
    return SequenceSlice(
        sequence_id=i, start_position=start, token_ids=token_ids, block_table=table[:used],
        sampling=SamplingSpec(),
    )  # fmt: skip

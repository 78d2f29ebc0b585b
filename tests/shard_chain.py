"""Shards of one model, called one after the other, without stages or links."""

from __future__ import annotations

import random
from pathlib import Path

import tiny_models
import torch

from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.shard import ShardModel

BLOCK, BLOCKS = 16, 64


class Chain:
    """Shards of one model, called one after the other."""

    def __init__(self, path: Path, num_stages, fmt="fp32", **settings):
        checkpoint = open_checkpoint(path)
        self.config = decoder_config(checkpoint.config)
        edges = [round(i * self.config.num_layers / num_stages) for i in range(num_stages + 1)]
        self.shards = []
        for i in range(num_stages):
            spec = StageSpec(
                model_path=str(path), stage_index=i, num_stages=num_stages, first_layer=edges[i],
                end_layer=edges[i + 1], format=fmt, **settings,
            )  # fmt: skip
            shard = ShardModel.load(checkpoint, self.config, spec)
            shard.allocate_kv(BLOCKS)
            self.shards.append(shard)
        checkpoint.close()

    @torch.inference_mode()
    def log_probs(self, slices):
        hidden = None
        batch = MicroBatch(epoch=0, step=0, slices=slices)
        for shard in self.shards:
            hidden = shard.forward(batch, hidden)
        parts = [self.shards[-1].logits(rows) for rows in hidden.split(64)]
        return torch.log_softmax(torch.cat(parts), dim=-1)


def tables(seed=0):
    """Scattered, disjoint block tables for three sequences."""
    ids = list(range(BLOCKS))
    random.Random(seed).shuffle(ids)
    return ids[:21], ids[21:42], ids[42:63]


def part(sequence_id, table, start, token_ids):
    used = -(-(start + len(token_ids)) // BLOCK)
    return SequenceSlice(
        sequence_id=sequence_id, start_position=start, token_ids=token_ids, block_table=table[:used]
    )


def random_tokens(count, seed):
    generator = random.Random(seed)
    return [generator.randrange(tiny_models.VOCAB) for _ in range(count)]

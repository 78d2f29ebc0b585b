"""Attention of one layer and one decode step, with each kind of KV cache.

`python bench/kv_format.py [--context 1024] [--rounds 60] [--threads 1]`. The layer's own code, its
linear layers replaced by nothing: writing one token's key and value for each sequence, gathering,
both products. The formats take turns. Prints JSON: medians in microseconds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from tightfit.kernels.formats import KVFormat
from tightfit.workers.api import MicroBatch, SequenceSlice
from tightfit.workers.batch import BatchBuilder
from tightfit.workers.decoder import DecoderLayer
from tightfit.workers.decoder_config import DecoderConfig, decoder_config
from tightfit.workers.kv_cache import KVCache

BLOCK, MAX_BATCH = 16, 4
WARM_UPS = 5
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M, 9 heads on 3 KV heads of 64": {
        "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 1, "num_attention_heads": 9, "num_key_value_heads": 3,
        "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": True,
    },
    "BLOOM-176B, 112 heads of 128": {
        "model_type": "bloom", "hidden_size": 14336, "n_layer": 1, "n_head": 112,
        "vocab_size": 250880, "layer_norm_epsilon": 1e-5,
    },
}  # fmt: skip


def attention(config: DecoderConfig) -> DecoderLayer:
    """A layer whose linear layers and norms cost next to nothing."""
    qkv = torch.randn(MAX_BATCH, config.qkv_out, dtype=torch.bfloat16)
    up = torch.zeros(MAX_BATCH, config.mlp_up_out, dtype=torch.bfloat16)
    down = torch.zeros(MAX_BATCH, config.hidden_size, dtype=torch.bfloat16)
    weights: Any = SimpleNamespace(
        attn_norm=torch.clone, qkv=lambda x: qkv[: len(x)].clone(), attn_out=torch.clone,
        mlp_norm=torch.clone, mlp_up=lambda x: up[: len(x)], mlp_down=lambda x: down[: len(x)],
    )  # fmt: skip
    return DecoderLayer(config, weights, 0)


def step(config: DecoderConfig, kv: KVFormat, context: int, batch: int) -> Callable[[], object]:
    """One decode step of `batch` sequences, each the last token of `context`."""
    num_blocks = -(-context // BLOCK) * batch
    dtype = torch.bfloat16
    cache = KVCache(
        num_layers=1, num_blocks=num_blocks, block_size=BLOCK, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim, dtype=dtype, kv_format=kv,
    )  # fmt: skip
    # Blocks as they lie after a while: not in a row.
    order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist()
    tables = [order[i::batch] for i in range(batch)]
    width = 2 * config.num_kv_heads * config.head_dim
    for first in range(0, num_blocks * BLOCK, 64):
        cache.write(0, torch.arange(first, first + 64), torch.randn(64, width, dtype=dtype))
    builder = BatchBuilder(config, dtype=dtype, block_size=BLOCK, num_blocks=num_blocks)
    slices = [
        SequenceSlice(
            sequence_id=i, start_position=context - 1, token_ids=[0], block_table=tables[i]
        )
        for i in range(batch)
    ]
    inputs = builder.build(MicroBatch(epoch=0, step=0, slices=slices))
    layer, x = attention(config), torch.zeros(batch, config.hidden_size, dtype=dtype)
    return lambda: layer(x, inputs, cache)


@torch.inference_mode()
def measure(*, context: int, rounds: int, threads: int) -> dict[str, dict[str, float]]:
    """Medians in microseconds."""
    torch.set_num_threads(threads)
    results = {}
    for name, raw in SHAPES.items():
        config = decoder_config(raw)
        for batch in (1, MAX_BATCH):
            steps = {kv: step(config, kv, context, batch) for kv in (KVFormat.BF16, KVFormat.INT8)}
            times: dict[KVFormat, list[float]] = {kv: [] for kv in steps}
            for _ in range(WARM_UPS + rounds):
                for kv, run in steps.items():
                    started = time.perf_counter()
                    run()
                    times[kv].append(time.perf_counter() - started)
            results[f"{name}, {batch} sequence(s)"] = {
                str(kv): round(1e6 * statistics.median(some[WARM_UPS:]), 1)
                for kv, some in times.items()
            }
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(json.dumps(measure(**vars(args)), indent=1))

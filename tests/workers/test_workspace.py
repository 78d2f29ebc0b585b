"""The workspace's formulas against the kernels that they are about, and an H100's allocator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tightfit.kernels import cpu, packed_int8, paged_attention, w8a16, wxa16
from tightfit.workers import workspace
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import model_formats
from tightfit.workers.workspace import StepLimits, graph_bytes, workspace_bytes

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "gpu-results.json"
BLOOM = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": 14336,
    "n_layer": 70, "n_head": 112, "vocab_size": 250880, "seq_length": 2048,
}  # fmt: skip
MIB = 2**20


def bloom(**changes):
    return decoder_config({**BLOOM, **changes})


def test_what_is_assumed_of_the_kernels_is_what_they_do():
    assert workspace.GPU_DEQUANTIZED_ELEMENTS == w8a16.DEQUANTIZE_ELEMENTS
    assert workspace.CPU_SCRATCH_ELEMENTS == cpu.SCRATCH_ELEMENTS
    assert workspace.CPU_PACKED_FROM == packed_int8.PACKED_FROM
    assert workspace.CPU_DIGIT_TOKENS == packed_int8.CHUNK_TOKENS
    assert workspace.GPU_SPLIT_DECODES == paged_attention.MIN_PROGRAMS
    for n_out, n_in in w8a16.WEIGHT_SHAPES:
        for tokens in (1, 16, 64, 512):
            tiles = [w8a16.choose_tile(tokens, n_out, n_in)]
            tiles += [
                wxa16.choose_tile(bits, tokens, n_out, -(-n_in // size))
                for bits, size in ((4, 128), (3, 256))
            ]
            for tile in tiles:
                if tile.splits > 1:
                    rows = min(tokens, workspace.GPU_SPLIT_TOKENS)
                    most = rows * workspace.GPU_SPLIT_COLUMNS
                    assert tile.splits * tokens * n_out <= most


def test_what_graphs_keep_is_what_an_h100_gave_out():
    """Of two stages in one process. Those that ran first have cuBLAS's workspaces besides, whole
    mebibytes; they are in the reserve."""
    rows = json.loads(RESULTS.read_text())["blocks"]
    over = [row["measured_bytes"] - row["held_bytes"] for row in rows]
    config = bloom(n_layer=4, vocab_size=1024)
    limits = StepLimits(num_tokens=512, context=2048, num_sequences=512, block_size=16)
    predicted = 2 * graph_bytes(config, model_formats(config, "int4", device="cuda"), limits)
    assert min(over) == pytest.approx(predicted, rel=0.01)
    assert all((bytes_ - min(over)) % MIB == 0 for bytes_ in over)
    whole = 2 * workspace_bytes(config, model_formats(config, "int4", device="cuda"), 512)
    assert max(over) < whole


def test_a_gpu_needs_neither_masks_nor_gathered_keys():
    config = bloom()
    gpu, cpu_ = (model_formats(config, "int8", device=device) for device in ("cuda", "cpu"))
    assert workspace_bytes(config, gpu, 512) < 520 * MIB
    longer = {"max_context": 2048}, {"max_context": 256}
    assert len({workspace_bytes(config, gpu, 512, **one) // MIB for one in longer}) == 1
    assert len({workspace_bytes(config, cpu_, 512, **one) // MIB for one in longer}) == 2


def test_only_the_last_stage_counts_logits():
    config = bloom()
    for device in ("cpu", "cuda"):
        formats = model_formats(config, "int8", device=device)
        without, with_head = (
            workspace_bytes(config, formats, 16, max_context=64, has_head=has_head)
            for has_head in (False, True)
        )
        assert with_head > without + 64 * config.vocab_size * 4 / 2

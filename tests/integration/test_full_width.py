"""BLOOM-176B's width for real: one block is quantised, two that name it are served.

All 70 layers are `make full-width`.
"""

import math
import shutil

import pytest
import wide_models
from served import Served

from tightfit.client import Client
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard_bytes import layer_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

VOCAB, GIB = 1024, 2**30
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(int4 checkpoint of one block, what `tightfit quantize` said, its peak of memory)."""
    path = tmp_path_factory.mktemp("wide")
    config = wide_models.resized(wide_models.BLOOM_176B, layers=1, vocab_size=VOCAB)
    wide_models.save_source(path / "source", config)
    said, peak = wide_models.quantize(path / "source", path / "int4", "--format", "int4")
    shutil.rmtree(path / "source")
    yield path / "int4", said, peak
    shutil.rmtree(path)  # pytest would keep 1.3 GB of each of the last runs


@pytest.fixture(scope="module")
def served(quantized, tmp_path_factory):
    path = tmp_path_factory.mktemp("repeated") / "model"
    config = wide_models.resized(wide_models.BLOOM_176B, layers=4, vocab_size=VOCAB)
    wide_models.save_repeated(path, quantized[0], config)
    flags = (
        "--stages", "2", "--threads-per-stage", "1", "--kv-blocks", "4", "--max-batch-tokens", "16",
        "--max-context", "64", "--embedding-place", "host", "--no-prefix-cache",
    )  # fmt: skip
    with Served(path, *flags) as served:
        yield served
    shutil.rmtree(path)


def test_quantising_a_full_width_block_takes_less_than_one_in_fp32(quantized):
    _, said, peak = quantized
    block = decoder_config(wide_models.BLOOM_176B).largest_layer_elements
    assert block == pytest.approx(2.466e9, rel=1e-3)
    assert said["bits_per_weight"] == 4 + 20 / 128
    assert block / 2 < peak < 4 * block + 2 * GIB


def test_full_width_layers_answer_over_grpc_and_the_same_again(served):
    with Client(served.target, timeout_s=300) as client:
        one, other = (client.generate(PROMPT, max_tokens=4, ignore_eos=True) for _ in range(2))
        scores = client.score(PROMPT)
    assert len(one.token_ids) == 4
    assert all(0 <= token < VOCAB for token in one.token_ids)
    assert one.token_ids == other.token_ids
    assert all(math.isfinite(logprob) and logprob < 0 for logprob in scores.logprobs)


def test_layers_that_are_one_block_take_a_block_s_memory_on_each_stage(served):
    with Client(served.target, timeout_s=60) as client:
        stages = client.status().stages
    config = decoder_config(wide_models.BLOOM_176B)
    block = layer_bytes(config, model_formats(config, "int4"), 0)
    assert [(stage.first_layer, stage.end_layer) for stage in stages] == [(0, 2), (2, 4)]
    for stage in stages:
        memory = stage.memory
        assert memory.weight_bytes == memory.predicted_weight_bytes
        assert block < memory.weight_bytes < 1.05 * block
        assert memory.rss_anon_bytes < 1.5 * block

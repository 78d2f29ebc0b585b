"""Predicted bytes are the bytes held, for any decoder: random sizes, families, formats and cuts."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tightfit.kernels.formats import Format, KVFormat
from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.shard import ShardModel
from tightfit.workers.stage_memory import Predicted

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = 3


@st.composite
def configs(draw):
    """config.json of a small decoder."""
    family = draw(st.sampled_from(["bloom", "opt", "llama", "qwen2"]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8, 10, 16]))
    heads = kv_heads * (group if family in ("llama", "qwen2") else 1)
    hidden, layers = heads * head_dim, draw(st.integers(1, 4))
    tied, wide = draw(st.booleans()), draw(st.integers(8, 200))
    shared = {"vocab_size": draw(st.integers(5, 150)), "tie_word_embeddings": tied}
    if family == "bloom":
        return {
            "model_type": "bloom", "architectures": ["BloomForCausalLM"], "hidden_size": hidden,
            "n_head": heads, "n_layer": layers, "seq_length": 64, **shared,
        }  # fmt: skip
    sizes = {
        "hidden_size": hidden, "num_attention_heads": heads, "num_hidden_layers": layers,
        "max_position_embeddings": 64, **shared,
    }  # fmt: skip
    if family == "opt":
        return {
            "model_type": "opt", "architectures": ["OPTForCausalLM"], "ffn_dim": wide,
            "word_embed_proj_dim": draw(st.sampled_from([hidden, hidden + 6])),
            "enable_bias": draw(st.booleans()),
            "layer_norm_elementwise_affine": draw(st.booleans()),
            "do_layer_norm_before": draw(st.booleans()), **sizes,
        }  # fmt: skip
    biases = draw(st.booleans())
    own = {"attention_bias": biases, "mlp_bias": draw(st.booleans())} if family == "llama" else {}
    name = "LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"
    return {
        "model_type": family, "architectures": [name], "intermediate_size": wide,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5, **own, **sizes,
    }  # fmt: skip


def save(config, path):
    """A checkpoint of random weights."""
    decoder = decoder_config(config)
    wanted = dict([*decoder.embedding_tensors(), *decoder.head_tensors()])
    for layer in range(decoder.num_layers):
        wanted |= dict(decoder.layer_tensors(layer))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        decoder.full_name(name, decoder.names.prefixes[0]): torch.randn(shape, generator=generator)
        for name, shape in wanted.items()
    }
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return decoder


@settings(
    max_examples=60, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    config=configs(),
    fmt=st.sampled_from(list(Format)),
    head=st.sampled_from(["auto", "bf16", "int8", "int4"]),
    kv=st.sampled_from(["auto", KVFormat.INT8]),
    place=st.sampled_from(["device", "host"]),
    data=st.data(),
)
def test_of_any_decoder_weights_and_kv_cache_are_predicted_to_the_byte(
    config, fmt, head, kv, place, data
):
    head = "auto" if fmt is Format.FP32 else head
    with tempfile.TemporaryDirectory() as folder:
        decoder = save(config, Path(folder))
        edges = data.draw(st.sets(st.integers(1, decoder.num_layers), max_size=3))
        cuts = sorted({0, *edges, decoder.num_layers})
        for index, (first, end) in enumerate(pairwise(cuts)):
            spec = StageSpec(
                model_path=folder, stage_index=index, num_stages=len(cuts) - 1, first_layer=first,
                end_layer=end, format=fmt, head_format=head, kv_format=kv, embedding_place=place,
            )  # fmt: skip
            checkpoint = open_checkpoint(folder)
            shard = ShardModel(decoder, spec)
            predicted = Predicted.of(checkpoint, decoder, shard.formats, spec)
            shard = ShardModel.load(checkpoint, decoder, spec)
            checkpoint.close()
            shard.allocate_kv(BLOCKS)
            measured = (
                shard.weight_bytes, shard.embedding_bytes, shard.head_bytes, shard.host_bytes,
                shard.kv_cache_bytes,
            )  # fmt: skip
            assert measured == (
                predicted.weights, predicted.embedding, predicted.head, predicted.host,
                BLOCKS * predicted.kv_block,
            )  # fmt: skip
            assert math.prod(measured[::4]) > 0

"""Shards on a GPU beside the same shards on the CPU, in micro-batches that mix chunks and decodes.

Both compute in bf16, and round differently: what the CPU loses to fp32 by that is the measure."""

from dataclasses import dataclass

import pytest
import torch
from shard_chain import Chain, part, tables
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from tightfit.workers.errors import UnsupportedModelError
from tightfit.workers.shard import spec_formats
from tightfit.workers.shard_bytes import shard_bytes

pytestmark = pytest.mark.gpu

ROUNDINGS = {"bf16": 2, "int8": 2, "llm_int8": 8, "int4": 2, "int3": 2}
"""How much of bf16's rounding may be between them. For `llm_int8` each device measures from how
many tokens on activations are rounded to int8 as well."""

VOCABULARY = 211
LAYERS = 4


def _bloom():
    return BloomForCausalLM(
        BloomConfig(
            hidden_size=128, n_head=4, n_layer=LAYERS, vocab_size=VOCABULARY, seq_length=512,
            initializer_range=0.15,
        )
    )  # fmt: skip


def _opt():
    return OPTForCausalLM(
        OPTConfig(
            hidden_size=192, num_attention_heads=3, num_hidden_layers=LAYERS, ffn_dim=384,
            vocab_size=VOCABULARY, max_position_embeddings=512, word_embed_proj_dim=192,
            init_std=0.15,
        )
    )  # fmt: skip


def _llama():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=LAYERS,
            intermediate_size=384, vocab_size=VOCABULARY, max_position_embeddings=512,
            initializer_range=0.1,
        )
    )  # fmt: skip


MODELS = {"bloom": _bloom, "opt": _opt, "llama": _llama}


@dataclass
class Steps:
    """Log-probabilities of a few steps of three sequences."""

    chunk: torch.Tensor
    mixed: torch.Tensor
    decodes: torch.Tensor


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    paths = {}
    for name, make in MODELS.items():
        torch.manual_seed(5)
        paths[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(paths[name])
    return paths


def _tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (count,), generator=generator).tolist()


def _run(path, fmt, **settings):
    chain = Chain(path, 2, fmt, **settings)
    one, two, three = tables()
    first, second, third = _tokens(90, 1), _tokens(40, 2), _tokens(70, 3)
    chunk = chain.log_probs([part(1, one, 0, first[:70]), part(2, two, 0, second[:33])])
    mixed = chain.log_probs(
        [
            part(2, two, 33, second[33:34]),
            part(3, three, 0, third[:60]),
            part(1, one, 70, first[70:75]),
        ]
    )
    decodes = [
        chain.log_probs(
            [
                part(1, one, 75 + i, first[75 + i : 76 + i]),
                part(2, two, 34 + i, second[34 + i : 35 + i]),
                part(3, three, 60 + i, third[60 + i : 61 + i]),
            ]
        )
        for i in range(3)
    ]
    return Steps(chunk.float().cpu(), mixed.float().cpu(), torch.cat(decodes).float().cpu())


@pytest.mark.parametrize("kv_format", ["auto", "int8"])
@pytest.mark.parametrize("fmt", ["bf16", "int8", "llm_int8", "int4", "int3"])
@pytest.mark.parametrize("model", MODELS)
def test_a_gpu_computes_what_the_cpu_does(model, fmt, kv_format, checkpoints):
    exact = _run(checkpoints[model], "fp32")
    plain = _run(checkpoints[model], "bf16")
    cpu = _run(checkpoints[model], fmt, kv_format=kv_format)
    gpu = _run(checkpoints[model], fmt, kv_format=kv_format, device="cuda")
    for name in ("chunk", "mixed", "decodes"):
        rounding = (getattr(plain, name) - getattr(exact, name)).abs()
        difference = (getattr(gpu, name) - getattr(cpu, name)).abs()
        assert getattr(exact, name).std() > 0.5
        assert difference.mean() <= ROUNDINGS[fmt] * rounding.mean(), name
        assert difference.max() <= 2 * ROUNDINGS[fmt] * rounding.max(), name


def test_the_same_step_gives_the_same_bits_again(checkpoints):
    first = _run(checkpoints["llama"], "int4", device="cuda")
    second = _run(checkpoints["llama"], "int4", device="cuda")
    assert torch.equal(first.mixed, second.mixed)
    assert torch.equal(first.decodes, second.decodes)


def test_a_sequence_gets_the_same_decode_from_every_graph(checkpoints):
    """Alone, or padded to eight."""
    chain = Chain(checkpoints["bloom"], 1, "int8", device="cuda")
    blocks = [list(range(i * 2, i * 2 + 2)) for i in range(8)]
    tokens = _tokens(20, 4)
    for i, table in enumerate(blocks):
        chain.log_probs([part(i, table, 0, tokens)])
    alone = chain.log_probs([part(0, blocks[0], 20, [7])])
    several = chain.log_probs([part(i, table, 20, [7]) for i, table in enumerate(blocks[:5])])
    assert (several - alone).abs().max() < 0.05


def test_predicted_bytes_are_those_that_the_gpu_holds(checkpoints):
    for fmt in ("int8", "int4", "int3"):
        chain = Chain(checkpoints["llama"], 2, fmt, device="cuda")
        for shard in chain.shards:
            spec = shard.spec
            predicted = shard_bytes(
                chain.config, spec_formats(chain.config, spec), spec.first_layer, spec.end_layer,
                has_embedding=spec.is_first, has_head=spec.is_last,
            )  # fmt: skip
            assert shard.weight_bytes == predicted


def test_a_model_that_the_kernels_do_not_take_is_refused_by_name(tmp_path):
    config = LlamaConfig(
        hidden_size=160, num_attention_heads=8, num_hidden_layers=1, intermediate_size=64,
        vocab_size=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="heads of 20 features"):
        Chain(tmp_path, 1, "int8", device="cuda")

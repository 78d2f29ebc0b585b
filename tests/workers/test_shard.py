from dataclasses import replace

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from shard_chain import BLOCK, BLOCKS, Chain, part, random_tokens, tables

from tightfit.kernels.formats import Format
from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import CheckpointError, StageError
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard import ShardModel
from tightfit.workers.shard_bytes import kv_block_bytes, shard_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tiny_models.build(variant, tmp_path_factory.mktemp("m") / variant)
        return made[variant]

    return get


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_every_variant_agrees_with_transformers(models, variant):
    model = models(variant)
    chain = Chain(model.path, 1)
    tokens = random_tokens(70, seed=3)
    table = tables()[0]
    mine = [
        chain.log_probs([part(0, table, 0, tokens[:33])]),
        chain.log_probs([part(0, table, 33, tokens[33:60])]),
        *(chain.log_probs([part(0, table, i, [tokens[i]])]) for i in range(60, 70)),
    ]
    torch.testing.assert_close(torch.cat(mine), model.log_probs(tokens), atol=1e-3, rtol=0)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("variant", ["bloom", "opt-350m", "llama"])
@pytest.mark.parametrize("length", [1, 2, 17, 300])
def test_greedy_tokens_are_those_of_transformers(models, variant, num_stages, length):
    model = models(variant)
    chain = Chain(model.path, num_stages)
    prompt = random_tokens(length, seed=length)
    table = tables(length)[1]
    log_probs = chain.log_probs([part(0, table, 0, prompt)])
    tokens = [int(log_probs[-1].argmax())]
    while len(tokens) < 6:
        position = length + len(tokens) - 1
        tokens.append(int(chain.log_probs([part(0, table, position, tokens[-1:])])[-1].argmax()))
    assert tokens == model.greedy(prompt, 6)


@pytest.mark.parametrize("variant", ["bloom-12-heads", "opt", "llama-head-dim"])
def test_sequences_in_one_micro_batch_do_not_touch_each_other(models, variant):
    model = models(variant)
    chain = Chain(model.path, 2)
    texts = [random_tokens(n, seed=n) for n in (40, 9, 130)]
    a, b, c = tables(7)
    chain.log_probs([part(0, a, 0, texts[0][:39]), part(1, b, 0, texts[1][:8])])
    together = chain.log_probs(
        [
            part(0, a, 39, texts[0][39:]),
            part(2, c, 0, texts[2][:100]),
            part(1, b, 8, texts[1][8:]),
        ]
    )
    rest = chain.log_probs([part(2, c, 100, texts[2][100:])])
    expected = [model.log_probs(text) for text in texts]
    torch.testing.assert_close(together[0], expected[0][39], atol=1e-3, rtol=0)
    torch.testing.assert_close(together[1:101], expected[2][:100], atol=1e-3, rtol=0)
    torch.testing.assert_close(together[101], expected[1][8], atol=1e-3, rtol=0)
    torch.testing.assert_close(rest, expected[2][100:], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("fmt", "limit"), [("bf16", 0.12), ("int8", 0.15), ("llm_int8", 0.2), ("int4", 1.5)]
)
@pytest.mark.parametrize("variant", ["bloom", "opt-350m", "llama"])
def test_smaller_formats_stay_close_to_full_precision(models, variant, fmt, limit):
    model = models(variant)
    tokens = random_tokens(60, seed=5)
    mine = Chain(model.path, 2, fmt).log_probs([part(0, tables()[0], 0, tokens)])
    exact = model.log_probs(tokens)
    divergence = (exact.exp() * (exact - mine)).sum(-1)
    assert divergence.mean() < limit


@pytest.mark.parametrize("fmt", [str(f) for f in Format])
@pytest.mark.parametrize("variant", ["bloom", "opt-350m", "opt-no-bias", "llama", "llama-mha-tied"])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_predicted_bytes_are_the_bytes_held(models, variant, fmt, num_stages):
    chain = Chain(models(variant).path, num_stages, fmt)
    for shard in chain.shards:
        spec = shard.spec
        predicted = shard_bytes(
            chain.config, model_formats(chain.config, fmt), spec.first_layer, spec.end_layer,
            has_embedding=spec.is_first, has_head=spec.is_last,
        )  # fmt: skip
        assert shard.weight_bytes == predicted
        layers = spec.end_layer - spec.first_layer
        assert shard.kv_cache_bytes == BLOCKS * kv_block_bytes(
            chain.config, model_formats(chain.config, fmt), layers, BLOCK
        )


def test_a_shard_reads_only_its_own_tensors(models):
    checkpoint = open_checkpoint(models("llama").path)
    config = decoder_config(checkpoint.config)
    read = []
    original = checkpoint.read
    checkpoint.read = lambda name: read.append(name) or original(name)
    spec = StageSpec(
        model_path="", stage_index=1, num_stages=3, first_layer=2, end_layer=3, format="int8"
    )
    ShardModel.load(checkpoint, config, spec)
    assert read
    assert all(".layers.2." in name for name in read)


def stage_spec(**changes):
    fields = {
        "model_path": "m", "stage_index": 0, "num_stages": 1, "first_layer": 0, "end_layer": 5,
        "format": "int8",
    }  # fmt: skip
    return StageSpec(**{**fields, **changes})


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
@pytest.mark.parametrize("variant", ["llama-mha-tied", "opt-350m"])
def test_progress_ends_at_the_bytes_that_were_announced(models, variant, fmt):
    checkpoint = open_checkpoint(models(variant).path)
    reports = []
    config = decoder_config(checkpoint.config)
    ShardModel.load(checkpoint, config, stage_spec(format=fmt), progress=reports.append)
    done = [report.bytes_done for report in reports]
    assert done == sorted(done)
    assert done[-1] == reports[-1].bytes_total == reports[0].bytes_total > 0


def test_shapes_are_checked_before_anything_is_read(models):
    checkpoint = open_checkpoint(models("llama").path)
    config = replace(decoder_config(checkpoint.config), intermediate_size=88)
    checkpoint.read = lambda name: pytest.fail(f"{name} was read")
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate_proj.weight.*\[88, 48\]"):
        ShardModel.load(checkpoint, config, stage_spec())


def test_a_layer_tensor_that_the_config_does_not_know_is_refused(models):
    checkpoint = open_checkpoint(models("llama-biases").path)
    config = decoder_config({**checkpoint.config, "attention_bias": False})
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.k_proj.bias: a llama layer"):
        ShardModel.load(checkpoint, config, stage_spec())


@pytest.mark.parametrize("variant", ["bloom", "opt", "llama"])
def test_names_without_the_usual_prefix_are_found(models, tmp_path, variant):
    source = models(variant).path
    prefix = {"bloom": "transformer.", "opt": "model.", "llama": "model."}[variant]
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name.removeprefix(prefix): tensor for name, tensor in tensors.items()},
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    slices = [part(0, tables()[0], 0, random_tokens(20, seed=1))]
    bare, usual = (Chain(path, 2).log_probs(slices) for path in (tmp_path, source))
    torch.testing.assert_close(bare, usual, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"block_table": [1]}, "do not cover"), ({"block_table": [1, BLOCKS]}, "does not have"),
     ({"block_table": [-1, 2]}, "does not have")],
)  # fmt: skip
def test_a_wrong_block_table_is_refused(models, change, message):
    chain = Chain(models("llama").path, 1)
    good = part(0, [3, 4], 0, list(range(20)))
    with pytest.raises(StageError, match=message):
        chain.log_probs([replace(good, **change)])


def test_a_mistral_window_limits_the_context(models):
    config = decoder_config(open_checkpoint(models("mistral-window").path).config)
    assert config.max_position == 320
    assert "320" in config.notes[0]


@pytest.mark.parametrize(("fmt", "head"), [("int4", "int8"), ("int3", "int8"), ("bf16", "bf16")])
def test_the_head_is_in_int8_where_the_layers_have_fewer_bits(models, fmt, head):
    shard = Chain(models("llama").path, 1, fmt).shards[0]
    assert shard.formats == model_formats(shard.config, fmt, head=head)


def test_the_head_has_a_format_of_its_own_when_asked(models):
    path = models("llama-mha-tied").path
    dense = Chain(path, 1, "int8", head_format="bf16").shards[0]
    small = Chain(path, 1, "int8", head_format="int4").shards[0]
    same = Chain(path, 1, "int8").shards[0]
    assert dense.weight_bytes < same.weight_bytes  # the embedding itself, held once
    assert small.weight_bytes < same.weight_bytes
    with pytest.raises(ValueError, match="choose fp32 for both or for neither"):
        model_formats(same.config, "fp32", head="int8")

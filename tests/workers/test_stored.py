"""Checkpoints that others have quantised, against transformers with the weights that they mean."""

import json

import pytest
import quantized_checkpoints
import torch
from safetensors.torch import load_file, save_file
from shard_chain import Chain, part, random_tokens, tables

from tightfit.kernels.formats import Format
from tightfit.workers.errors import CheckpointError, UnsupportedModelError
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard_bytes import shard_bytes
from tightfit.workers.stored import stored_quantization

pytestmark = pytest.mark.usefixtures("one_thread")

HELD = {"bitsandbytes": "int8", "gptq-8bit": "int8", "compressed-8bit": "int8",
        "compressed-bytes": "int8", "dense3": "int3"}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(style, variant="llama"):
        if (style, variant) not in made:
            path = tmp_path_factory.mktemp("m") / "model"
            made[style, variant] = quantized_checkpoints.build(style, variant, path)
        return made[style, variant]

    return get


def _log_probs(model, num_stages, fmt, tokens):
    chain = Chain(model.path, num_stages, fmt)
    return chain, chain.log_probs([part(0, tables()[0], 0, tokens)])


@pytest.mark.parametrize("style", quantized_checkpoints.STYLES)
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt", "llama-biases"])
def test_widened_to_fp32_it_is_what_transformers_computes_with_the_weights_that_are_meant(
    models, style, variant
):
    model, tokens = models(style, variant), random_tokens(40, seed=2)
    _, mine = _log_probs(model, 2, "fp32", tokens)
    torch.testing.assert_close(mine, model.log_probs(tokens), atol=2e-3, rtol=0)


@pytest.mark.parametrize("style", quantized_checkpoints.STYLES)
@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_by_default_its_numbers_are_held_as_they_are(models, style, variant):
    model, tokens = models(style, variant), random_tokens(40, seed=2)
    chain, mine = _log_probs(model, 2, "auto", tokens)
    _, widened = _log_probs(model, 2, "bf16", tokens)
    fmt = HELD.get(style, "int4")
    # 8 bits with whole zero points are widened: int8 has none.
    assert chain.shards[0].formats.layers == fmt
    exact = model.log_probs(tokens)
    divergence = [(exact.exp() * (exact - some)).sum(-1).mean() for some in (mine, widened)]
    # The head is in int8 or 4-bit layers have scales rounded to bf16; else both round activations.
    assert divergence[0] < 2 * divergence[1] + 0.05


@pytest.mark.parametrize("style", quantized_checkpoints.STYLES)
def test_predicted_bytes_are_the_bytes_held_but_for_the_order_of_features(models, style):
    chain = Chain(models(style).path, 2, "auto")
    for shard in chain.shards:
        spec = shard.spec
        predicted = shard_bytes(
            chain.config, model_formats(chain.config), spec.first_layer, spec.end_layer,
            has_embedding=spec.is_first, has_head=spec.is_last,
        )  # fmt: skip
        orders = 0
        if style == "gptq-act-order":
            orders = (spec.end_layer - spec.first_layer) * (2 * 48 + 80) * 4
        assert 0 <= shard.weight_bytes - predicted <= orders


def test_each_of_q_k_and_v_may_have_an_order_of_its_own(models):
    """Then they cannot be one product of one input: they are widened and quantised anew."""
    model, tokens = models("gptq-act-order"), random_tokens(40, seed=2)
    chain, mine = _log_probs(model, 1, "auto", tokens)
    qkv = chain.shards[0].layers[0].weights.qkv
    assert qkv.format is Format.INT4
    exact = model.log_probs(tokens)
    assert (exact.exp() * (exact - mine)).sum(-1).mean() < 1.5


def test_int8_can_be_computed_as_llm_int8(models):
    chain = Chain(models("bitsandbytes").path, 1, "llm_int8")
    same = Chain(models("bitsandbytes").path, 1, "auto")
    for mine, other in zip(chain.shards[0].layers, same.shards[0].layers, strict=True):
        assert mine.weights.qkv.format is Format.LLM_INT8
        assert torch.equal(mine.weights.qkv.weight.values, other.weights.qkv.weight.values)


def test_zero_biases_that_gptq_writes_are_passed_over_and_others_refused(models, tmp_path):
    model = models("gptq")
    for file in model.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.bias"] = torch.zeros(48).half()
    save_file(tensors, tmp_path / "model.safetensors")
    Chain(tmp_path, 1, "auto")
    tensors["model.layers.0.mlp.down_proj.bias"][7] = 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj\.bias: a llama layer .* no such tensor"):
        Chain(tmp_path, 1, "auto")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_proj.qweight", lambda t: t.float(), "is stored as fp32; by config.json .* whole"),
        ("q_proj.qweight", lambda t: t[:-1], r"q_proj.qweight: expected shape \[6, 48\]"),
        ("q_proj.scales", lambda t: t.fill_(float("nan")), "a scale is NaN or infinite"),
        ("q_proj.g_idx", lambda t: t.fill_(1), "not divided into 3 groups of one size"),
        ("q_proj.g_idx", lambda t: t.neg(), "not divided into 3 groups of one size"),
    ],
)
def test_damaged_tensors_are_named(models, tmp_path, name, change, message):
    for file in models("gptq").path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    full = f"model.layers.3.self_attn.{name}"
    tensors[full] = change(tensors[full]).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        Chain(tmp_path, 1, "auto")
    assert "layers.3.self_attn.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    ("style", "changes", "message"),
    [
        ("gptq", {"bits": 2}, "bits is 2; supported are 4, 8"),
        ("gptq", {"bits": "4"}, "bits is '4'"),
        ("gptq", {"group_size": 0}, "group_size is 0, neither positive nor -1"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"quant_method": "eetq"}, "quant_method is 'eetq'; supported are compressed-"),
        ("awq", {"version": "gemv"}, "version is 'gemv'; supported is gemm"),
        ("bitsandbytes", {"load_in_8bit": False}, "load_in_4bit is not supported"),
        ("compressed", {"format": "marlin-24"}, "format is 'marlin-24'; supported are pack-"),
        ("compressed", {"config_groups": {}}, "config_groups is {}"),
        ("compressed", {"quantization_status": "frozen"}, "quantization_status is 'frozen'"),
        ("compressed", {"sparsity_config": {"format": "x"}}, "sparsity_config is not supported"),
        ("compressed", {"ignore": "lm_head"}, "ignore is 'lm_head', not a list of names"),
    ],
)
def test_what_is_not_supported_is_named_with_the_way_out(style, changes, message):
    section = {**quantized_checkpoints.STYLES[style], **changes}
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        stored_quantization({"quantization_config": section})
    assert "16-bit checkpoint can be served" in str(caught.value)


def test_targets_are_names_patterns_or_all_linear_layers_and_names_go_first():
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    config = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*layers\\.1\\..*"],
        "config_groups": {
            "all": {"targets": ["Linear"], "weights": weights},
            "some": {"targets": ["re:.*down_proj$"], "weights": {**weights, "num_bits": 8}},
        },
    }  # fmt: skip
    stored = stored_quantization({"quantization_config": json.loads(json.dumps(config))})
    assert stored.scheme("model.layers.0.mlp.up_proj").bits == 4
    assert stored.scheme("model.layers.0.mlp.down_proj").bits == 8
    assert stored.scheme("model.layers.1.mlp.down_proj") is None
    assert stored.scheme("lm_head") is None

"""Models that the compressed-tensors package quantised, packed and saved."""

import pytest
import tiny_models
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from shard_chain import Chain, part, random_tokens, tables
from transformers import AutoModelForCausalLM

SETTINGS = {
    "int4 in groups": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 16},
    "symmetric int4": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 16},
    "int4 by channel": {"num_bits": 4, "symmetric": False, "strategy": "channel"},
    "int8 by channel": {"num_bits": 8, "symmetric": True, "strategy": "channel"},
}


def _meant(module, args):
    """The weight by the package's own functions; None: it is not quantised."""
    if getattr(module, "weight_scale", None) is None:
        return None
    scale, zero_point = module.weight_scale, getattr(module, "weight_zero_point", None)
    integers = quantize(module.weight, scale, zero_point, args, dtype=torch.int8)
    return dequantize(integers, scale.float(), zero_point, args)


def _saved(variant, settings, path):
    """Round to nearest on the grid of each group, as the package's observers would."""
    model = tiny_models.build(variant, path / "dense").hf.bfloat16()
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**settings))
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "weight_scale", None) is None:
            continue
        scale, bits = module.weight_scale, settings["num_bits"]
        groups = module.weight.float().view(*scale.shape, -1)
        least, greatest = groups.amin(-1).clamp_max(0), groups.amax(-1).clamp_min(0)
        if settings["symmetric"]:
            scale.data.copy_(torch.maximum(-least, greatest) * 2 / (2**bits - 1))
        else:
            scale.data.copy_((greatest - least) / (2**bits - 1))
            middle = 2 ** (bits - 1)
            zero_point = (-least / scale.float()).round().clamp(0, 2**bits - 1) - middle
            module.weight_zero_point.data.copy_(zero_point)
        module.quantization_status = "frozen"
    meant = {name: _meant(module, scheme.weights) for name, module in model.named_modules()}
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path / "packed")
    compressor.update_config(path / "packed")
    return path / "packed", meant


@pytest.mark.parametrize("name", [name for name in SETTINGS if SETTINGS[name]["symmetric"]])
@pytest.mark.parametrize("variant", ["llama", "opt"])
def test_we_compute_what_transformers_computes_with_it(tmp_path, name, variant):
    """Symmetric ones: of others, transformers 5.23 does not take the packed zero points."""
    path, _ = _saved(variant, SETTINGS[name], tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    _assert_alike(path, theirs)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("variant", ["llama", "bloom"])
def test_we_compute_what_the_package_says_the_weights_mean(tmp_path, name, variant):
    path, meant = _saved(variant, SETTINGS[name], tmp_path)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16).float()
    quantized = {module: weight for module, weight in meant.items() if weight is not None}
    assert quantized
    for module, weight in quantized.items():
        dense.get_submodule(module).weight.data.copy_(weight)
    _assert_alike(path, dense)


def _assert_alike(path, hf):
    tokens = random_tokens(40, seed=4)
    exact = tiny_models.TinyModel(path=path, hf=hf.eval()).log_probs(tokens)
    mine = Chain(path, 2, "fp32").log_probs([part(0, tables()[0], 0, tokens)])
    torch.testing.assert_close(mine, exact, atol=2e-3, rtol=0)

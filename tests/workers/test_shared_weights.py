"""Layers that are the same stored bytes: held once, and computed as if they were not."""

import re
import shutil

import pytest
import quantized_checkpoints
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from shard_chain import Chain, part, random_tokens, tables
from transformers import BloomForCausalLM

from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import Role, layer_roles, model_formats
from tightfit.workers.shard import ShardModel
from tightfit.workers.shard_bytes import layer_bytes
from tightfit.workers.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

LAYER = re.compile(r"(\.|^)(h|layers)\.(\d+)\.")
ORIGIN = 1
"""The layer whose weights those after it have, too."""


def tie_layers(source, path, *, own=r"$^"):
    """Two checkpoints of the same tensors: `bin`, in which all layers after ORIGIN share its stored
    bytes but for names that match `own`, and `safetensors`, in which nothing is shared."""
    tensors = load_file(source / "model.safetensors")
    tied = {}
    for name, tensor in tensors.items():
        layer = LAYER.search(name)
        if layer and int(layer[3]) > ORIGIN and not re.search(own, name):
            tensor = tensors[LAYER.sub(rf"\g<1>\g<2>.{ORIGIN}.", name)]
        tied[name] = tensor
    for kind in ("bin", "safetensors"):
        (path / kind).mkdir(parents=True)
        shutil.copy(source / "config.json", path / kind)
    torch.save(tied, path / "bin" / "pytorch_model.bin")
    apart = {name: tensor.clone() for name, tensor in tied.items()}
    save_file(apart, path / "safetensors" / "model.safetensors")
    return path / "bin", path / "safetensors"


def build(style, variant, path):
    if style == "plain":
        return tiny_models.build(variant, path).path
    return quantized_checkpoints.build(style, variant, path).path


def held_bytes(path, *, fmt, num_stages):
    return [shard.weight_bytes for shard in Chain(path, num_stages, fmt).shards]


CASES = [
    ("plain", "bloom", "fp32"),
    ("plain", "opt", "int8"),
    ("plain", "llama-mha-tied", "int4"),
    ("compressed", "bloom", "auto"),
    ("compressed", "llama", "int8"),
]
REORDERED = ("gptq-act-order", "llama", "auto")
"""Whether its order of features takes any bytes is not in its config, so they are not predicted."""


@pytest.mark.parametrize(("style", "variant", "fmt"), [*CASES, REORDERED])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_layers_in_one_place_compute_what_copies_of_them_do(
    tmp_path, style, variant, fmt, num_stages
):
    tied, apart = tie_layers(build(style, variant, tmp_path / "model"), tmp_path)
    slices = [part(0, tables()[0], 0, random_tokens(40, seed=1))]
    one, other = (Chain(path, num_stages, fmt).log_probs(slices) for path in (tied, apart))
    torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(("style", "variant", "fmt"), CASES)
def test_layers_in_one_place_are_held_once(tmp_path, style, variant, fmt):
    tied, apart = tie_layers(build(style, variant, tmp_path / "model"), tmp_path)
    config = decoder_config(open_checkpoint(tied).config)
    formats = model_formats(config, fmt)
    roles = layer_roles(config, 0)
    linears = layer_bytes(config, formats, 0) - layer_bytes(
        config, formats, 0, {(0, role) for role in roles}
    )
    (whole,) = held_bytes(apart, fmt=fmt, num_stages=1)
    (once,) = held_bytes(tied, fmt=fmt, num_stages=1)
    assert whole - once == (config.num_layers - 1 - ORIGIN) * linears > 0


@pytest.mark.parametrize(("style", "variant", "fmt"), CASES)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_stage_predicts_what_it_holds_of_shared_layers(tmp_path, style, variant, fmt, num_stages):
    tied, apart = tie_layers(build(style, variant, tmp_path / "model"), tmp_path)
    for path in (tied, apart):
        for index in range(num_stages):
            edges = (0, 2, tiny_models.LAYERS) if num_stages == 2 else (0, tiny_models.LAYERS)
            spec = StageSpec(
                model_path=str(path), stage_index=index, num_stages=num_stages, format=fmt,
                first_layer=edges[index], end_layer=edges[index + 1], num_kv_blocks=1,
            )  # fmt: skip
            memory = Stage(spec).memory()
            assert memory.weight_bytes == memory.predicted_weight_bytes > 0


def test_a_layer_with_one_tensor_of_its_own_is_not_shared(tmp_path):
    source = tiny_models.build("bloom", tmp_path / "model").path
    own = rf"h\.{tiny_models.LAYERS - 1}\.mlp\.dense_h_to_4h\.bias"
    tied, apart = tie_layers(source, tmp_path / "one", own=own)
    all_tied, _ = tie_layers(source, tmp_path / "all")
    slices = [part(0, tables()[0], 0, random_tokens(40, seed=1))]
    one, other, wrong = (
        Chain(path, 1, "fp32").log_probs(slices) for path in (tied, apart, all_tied)
    )
    torch.testing.assert_close(one, other, atol=0, rtol=0)
    assert not torch.equal(one, wrong)
    config = decoder_config(open_checkpoint(tied).config)
    formats = model_formats(config, "fp32")
    up = layer_bytes(config, formats, 0) - layer_bytes(config, formats, 0, {(0, Role.MLP_UP)})
    (mine,) = held_bytes(tied, fmt="fp32", num_stages=1)
    (least,) = held_bytes(all_tied, fmt="fp32", num_stages=1)
    assert mine - least == up


def test_a_shared_tensor_is_read_and_counted_once(tmp_path):
    tied, _ = tie_layers(tiny_models.build("opt", tmp_path / "model").path, tmp_path)
    checkpoint = open_checkpoint(tied)
    read, original = [], checkpoint.read
    checkpoint.read = lambda name: read.append(name) or original(name)
    reports = []
    spec = StageSpec(
        model_path=str(tied), stage_index=0, num_stages=1, first_layer=0,
        end_layer=tiny_models.LAYERS, format="int8",
    )  # fmt: skip
    ShardModel.load(checkpoint, decoder_config(checkpoint.config), spec, progress=reports.append)
    layers = {int(LAYER.search(name)[3]) for name in read if "fc1.weight" in name}
    assert layers == {0, ORIGIN}
    assert reports[-1].bytes_done == reports[-1].bytes_total > 0


def test_transformers_reads_what_the_test_ties(tmp_path):
    model = tiny_models.build("bloom", tmp_path / "model")
    tied, _ = tie_layers(model.path, tmp_path)
    theirs = BloomForCausalLM.from_pretrained(tied).eval()
    tokens = random_tokens(20, seed=2)
    expected = tiny_models.TinyModel(path=tied, hf=theirs).log_probs(tokens)
    mine = Chain(tied, 1).log_probs([part(0, tables()[0], 0, tokens)])
    torch.testing.assert_close(mine, expected, atol=1e-3, rtol=0)

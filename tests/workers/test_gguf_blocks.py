"""GGUF's 4-bit blocks, held as the file has them, against llama.cpp's own arithmetic."""

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind
from gguf_files import HEAD_DIM, HEADS, HIDDEN, INNER, ROLES, VOCAB, Model
from safetensors.torch import save_file
from shard_chain import BLOCK, Chain, part, random_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit.kernels.formats import Format
from tightfit.kernels.groups import pack_groups
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.checkpoints.packed import read_stored
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import CheckpointError, UnsupportedModelError
from tightfit.workers.model_formats import Role, Scheme, model_formats
from tightfit.workers.shard_bytes import shard_bytes
from tightfit.workers.stored import stored_quantization

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCK_KINDS = [Kind.Q4_0, Kind.Q4_1]
LAYER = "model.layers.0."
TABLE = list(range(8))


def linears():
    return [(LAYER + name, shape) for name, shape in ROLES.values() if len(shape) == 2]


def as_directory(model, path):
    """The same weights, widened, as a checkpoint directory."""
    path.mkdir()
    config = LlamaConfig(
        **{
            key: value
            for key, value in open_checkpoint(model.path).config.items()
            if key not in ("quantization_config", "architectures", "model_type")
        }
    )
    LlamaForCausalLM(config).config.save_pretrained(path)
    save_file(model.expected, path / "model.safetensors")
    return path


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_the_blocks_read_stand_for_the_weights_that_are_read_widened(tmp_path, arch, kind):
    model = Model(tmp_path / "m.gguf", arch=arch, kind=kind, biases=arch == "qwen2")
    checkpoint = open_checkpoint(model.finish())
    config = decoder_config(checkpoint.config)
    for full, (n_out, n_in) in linears():
        scheme = config.stored_scheme(full.removeprefix("model."))
        blocks = {"weight_blocks": checkpoint.read(f"{full}.weight_blocks")}
        stored = read_stored(blocks, scheme, n_out, n_in)
        exact = model.expected[f"{full}.weight"]
        torch.testing.assert_close(stored.dequantize(), exact, atol=1e-6, rtol=1e-5)
        # Held, scale and zero are rounded to bf16, by 2^-8 of them at most.
        scale = stored.weight.scale
        zero = (8 - stored.weight.zero_point) * scale
        allowed = (8 * scale.abs() + zero.abs()) * 2**-8 * (1 + 1e-3)
        error = (pack_groups(stored.weight).dequantize() - exact).abs()
        assert (error.view(n_out, -1, 32).amax(-1) <= allowed).all()


def test_blocks_of_equal_values_negative_scales_and_zeros_are_what_llama_cpp_makes_of_them():
    rng = np.random.default_rng(0)
    flat = np.array([[0, 0.37], [0, -1e-3], [0, 0], [2e-7, 3.0], [-0.5, 1.0]], np.float16)
    for kind, numbers in ((Kind.Q4_1, flat), (Kind.Q4_0, flat[:, :1] - np.float16(0.2))):
        values = rng.integers(0, 256, (len(numbers), 16), dtype=np.uint8)
        blocks = np.concatenate((numbers.view(np.uint8), values), 1)
        exact = torch.from_numpy(gguf.quants.dequantize(blocks, kind))
        scheme = stored_quantization(
            {"quantization_config": {"quant_method": "gguf", "types": {"x": kind.name}}}
        ).scheme("x")
        tensor = torch.from_numpy(blocks)[:, None]
        stored = read_stored({"weight_blocks": tensor}, scheme, len(numbers), 32)
        torch.testing.assert_close(stored.dequantize(), exact, atol=1e-7, rtol=1e-5)
        held = pack_groups(stored.weight).dequantize()
        torch.testing.assert_close(held, exact, atol=1e-2, rtol=2**-8)


@pytest.mark.parametrize("kind", BLOCK_KINDS)
def test_by_default_the_blocks_are_held_in_int4_and_computed_as_their_widened_weights(
    tmp_path, kind
):
    model = Model(tmp_path / "m.gguf", kind=kind)
    model.finish()
    chain = Chain(model.path, 1, "auto")
    formats = model_formats(chain.config)
    assert formats.layers is Format.INT4
    assert formats.head is Format.INT8
    (shard,) = chain.shards
    weights = shard.layers[0].weights
    for linear in (weights.qkv, weights.attn_out, weights.mlp_up, weights.mlp_down):
        assert (linear.format, linear.weight.group_size) == (Format.INT4, 32)
    assert shard.weight_bytes == shard_bytes(
        chain.config, formats, 0, 1, has_embedding=True, has_head=True
    )
    tokens = [t % VOCAB for t in random_tokens(40, seed=1)]
    step = [part(0, TABLE, 0, tokens)]
    exact = Chain(model.path, 1, "fp32").log_probs(step)
    divergence = {
        fmt: float(
            (exact.exp() * (exact - Chain(model.path, 1, fmt).log_probs(step))).sum(-1).mean()
        )
        for fmt in ("auto", "int8", "int3")
    }
    # Nothing is rounded again but scales: no worse than rounding to 8 bits, nowhere near 3.
    assert 0 < divergence["auto"] < 2 * divergence["int8"] + 1e-3
    assert divergence["auto"] < divergence["int3"] / 10


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "llm_int8", "int3"])
def test_in_another_format_it_is_bit_for_bit_the_widened_model(tmp_path, fmt):
    model = Model(tmp_path / "m.gguf", kind=Kind.Q4_1)
    model.finish()
    dense = as_directory(model, tmp_path / "dense")
    step = [part(0, TABLE, 0, [t % VOCAB for t in random_tokens(2 * BLOCK, seed=2)])]
    chain = Chain(model.path, 1, fmt)
    assert not chain.shards[0].formats.stored
    assert torch.equal(chain.log_probs(step), Chain(dense, 1, fmt).log_probs(step))


def test_what_has_another_type_is_widened_and_rounded_to_int8(tmp_path):
    kinds = {"ffn_down": Kind.Q8_0, "attn_v": Kind.Q4_0}
    path = Model(tmp_path / "m.gguf", kind=Kind.Q4_1, kinds=kinds).finish()
    chain = Chain(path, 1, "auto")
    formats = chain.shards[0].formats
    assert formats.stored[0] == {
        role: Scheme(format=Format.INT4, group_size=32) for role in (Role.ATTN_OUT, Role.MLP_UP)
    }
    weights = chain.shards[0].layers[0].weights
    assert weights.qkv.format is weights.mlp_down.format is Format.INT8
    predicted = shard_bytes(chain.config, formats, 0, 1, has_embedding=True, has_head=True)
    assert chain.shards[0].weight_bytes == predicted
    mostly = Model(tmp_path / "n.gguf", kind=Kind.Q8_0, kinds={"attn_output": Kind.Q4_0}).finish()
    formats = model_formats(decoder_config(open_checkpoint(mostly).config))
    assert formats.layers is Format.INT8
    assert set(formats.stored[0]) == {Role.ATTN_OUT}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q5_0, Kind.Q8_0])
def test_other_types_have_no_format_of_their_own_and_become_int8(tmp_path, kind):
    config = open_checkpoint(Model(tmp_path / "m.gguf", kind=kind).finish()).config
    assert "quantization_config" not in config
    assert model_formats(decoder_config(config)).layers is Format.INT8


def test_a_block_whose_scale_is_no_number_is_refused_with_the_layer(tmp_path):
    model = Model(tmp_path / "m.gguf", kind=Kind.Q4_1)
    path = model.finish()
    packed = gguf.quants.quantize(model.expected[LAYER + "mlp.up_proj.weight"].numpy(), Kind.Q4_1)
    content = bytearray(path.read_bytes())
    start = content.index(packed.tobytes())
    content[start : start + 2] = np.array([np.nan], np.float16).tobytes()
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"mlp\.(gate|up)_proj.*scale is NaN or infinite"):
        Chain(path, 1, "auto")


def test_a_directory_that_only_says_gguf_is_refused():
    with pytest.raises(UnsupportedModelError, match="this is no GGUF file"):
        stored_quantization({"quantization_config": {"quant_method": "gguf"}})


def test_the_sizes_of_these_models_have_whole_blocks():
    assert HEADS * HEAD_DIM == HIDDEN == 32
    assert INNER % 32 == 0

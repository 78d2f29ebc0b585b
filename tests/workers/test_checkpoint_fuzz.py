"""Damaged files: cut anywhere or with bytes changed, they are read or raise CheckpointError."""

import contextlib
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.errors import CheckpointError

FUZZ = settings(
    max_examples=300, deadline=5_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _safetensors(path):
    save_file({"a": torch.ones(3, 5), "b": torch.ones(7).bfloat16()}, path / "model.safetensors")
    return path / "model.safetensors"


def _bin(path):
    torch.save({"a": torch.ones(3, 5), "b": torch.ones(7).bfloat16()}, path / "pytorch_model.bin")
    return path / "pytorch_model.bin"


def _gguf(path):
    file = path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length"):
        writer.add_uint32(f"llama.{key}", 32)
    writer.add_uint32("llama.attention.head_count", 4)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_token_list([f"t{i}" for i in range(8)])
    weight = np.ones((8, 32), np.float32)
    quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("token_embd.weight", weight)
    writer.add_tensor("blk.0.attn_q.weight", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


WRITERS = {"safetensors": _safetensors, "bin": _bin, "gguf": _gguf}


@pytest.fixture(params=WRITERS)
def whole(request, tmp_path):
    """(the file, its undamaged content)"""
    (tmp_path / "config.json").write_text("{}")
    file = WRITERS[request.param](tmp_path)
    return file, file.read_bytes()


def _read_all(file):
    """Everything there is to ask of a checkpoint."""
    checkpoint = open_checkpoint(file.parent)
    assert checkpoint.source_format
    json.dumps(dict(checkpoint.config))
    total = 0
    for name in checkpoint.names():
        with contextlib.suppress(CheckpointError):
            checkpoint.validate([(name, checkpoint.shape(name))])
            assert checkpoint.nbytes(name) <= file.stat().st_size
            tensor = checkpoint.read(name)
            assert tuple(tensor.shape) == checkpoint.shape(name)
            total += float(tensor.double().nan_to_num().sum())
    checkpoint.close()
    return total


def test_the_undamaged_file_is_read(whole):
    assert _read_all(whole[0]) > 0


@FUZZ
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_refused(whole, data):
    file, content = whole
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(CheckpointError):
        _read_all(file)


@FUZZ
@given(data=st.data())
def test_a_file_with_bytes_changed_is_read_or_refused(whole, data):
    file, content = whole
    damaged = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(damaged)
    with contextlib.suppress(CheckpointError):
        _read_all(file)


@FUZZ
@given(data=st.data())
def test_a_file_with_a_huge_number_in_it_is_read_or_refused(whole, data):
    file, content = whole
    width, code = data.draw(st.sampled_from([(4, "<I"), (8, "<Q")]))
    at = data.draw(st.integers(0, len(content) - width))
    limit = 2 ** (8 * width)
    number = data.draw(st.sampled_from([limit - 1, limit // 2, limit // 2 - 1, limit // 4]))
    file.write_bytes(content[:at] + struct.pack(code, number) + content[at + width :])
    with contextlib.suppress(CheckpointError):
        _read_all(file)

"""Checkpoint directories: safetensors and .bin, single and sharded; what is said of bad ones."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.errors import CheckpointError, WorkerError

FORMATS = ("safetensors", "bin")
STEMS = {"safetensors": "model", "bin": "pytorch_model"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {
        "embed.weight": torch.randn(20, 8, generator=generator).to(dtype),
        "h.0.weight": torch.randn(8, 8, generator=generator).to(dtype),
        "h.0.bias": torch.randn(8, generator=generator).to(dtype),
        "h.1.weight": torch.randn(3, 5, generator=generator).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }


def _save(tensors, path):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)


def _single(directory, suffix, tensors):
    (directory / "config.json").write_text('{"model_type": "llama"}')
    file = directory / f"{STEMS[suffix]}.{suffix}"
    _save(tensors, file)
    return file


def _sharded(directory, suffix, tensors):
    """Two shards; returns them."""
    (directory / "config.json").write_text('{"model_type": "llama"}')
    names = list(tensors)
    files = [directory / f"{STEMS[suffix]}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    weight_map = {}
    for file, part in zip(files, (names[:2], names[2:]), strict=True):
        _save({name: tensors[name] for name in part}, file)
        weight_map |= dict.fromkeys(part, file.name)
    _index(directory, suffix).write_text(json.dumps({"weight_map": weight_map}))
    return files


def _index(directory, suffix):
    return directory / f"{STEMS[suffix]}.{suffix}.index.json"


@pytest.mark.parametrize("write", [_single, _sharded])
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_is_read_as_it_was_stored(tmp_path, suffix, write, dtype):
    tensors = _tensors(DTYPES[dtype])
    write(tmp_path, suffix, tensors)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.names() == frozenset(tensors)
    checkpoint.validate((name, tuple(tensor.shape)) for name, tensor in tensors.items())
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == dtype
        assert checkpoint.nbytes(name) == tensor.nbytes
    assert dtype in checkpoint.source_format
    assert suffix in checkpoint.source_format
    checkpoint.close()


def test_bin_files_keep_strides_sharing_and_parameters(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "whole": base,
        "transposed": base.t(),
        "part": base[1:3, 2:5],
        "expanded": base[:, :1].expand(4, 6),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "scalar": torch.tensor(5.0),
    }
    _single(tmp_path, "bin", saved)
    checkpoint = open_checkpoint(tmp_path)
    for name, tensor in saved.items():
        assert torch.equal(checkpoint.read(name), tensor.detach())


def test_names_of_one_stored_tensor_have_one_place_and_no_others_do(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    saved = {
        "whole": base,
        "same": base.detach(),
        "transposed": base.t(),
        "reshaped": base.view(6, 4),
        "part": base[1:],
        "copy": base.clone(),
        "whole numbers": torch.zeros(4, 6, dtype=torch.int64),
    }
    _single(tmp_path, "bin", saved)
    checkpoint = open_checkpoint(tmp_path)
    places = {name: checkpoint.place(name) for name in saved}
    assert places["whole"] == places["same"]
    assert len(set(places.values())) == len(saved) - 1


@pytest.mark.parametrize("write", [_single, _sharded])
def test_every_tensor_of_safetensors_has_a_place_of_its_own(tmp_path, write):
    tensors = {name: tensor for name, tensor in _tensors().items() if tensor.numel()}
    write(tmp_path, "safetensors", tensors)
    checkpoint = open_checkpoint(tmp_path)
    places = {name: checkpoint.place(name) for name in tensors}
    assert len(set(places.values())) == len(tensors)
    assert places == {name: open_checkpoint(tmp_path).place(name) for name in tensors}


def test_a_module_s_state_dict_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    _single(tmp_path, "bin", module.state_dict())
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names() == frozenset(module.state_dict())
    assert torch.equal(checkpoint.read("0.weight"), module[0].weight)


def test_safetensors_go_before_bin(tmp_path):
    _single(tmp_path, "bin", {"a": torch.zeros(2)})
    _single(tmp_path, "safetensors", {"a": torch.ones(2)})
    assert torch.equal(open_checkpoint(tmp_path).read("a"), torch.ones(2))


def test_tensors_outlive_the_checkpoint(tmp_path):
    big = torch.arange(2**19, dtype=torch.float32)
    _single(tmp_path, "safetensors", {"big": big, "small": big[:10].clone()})
    checkpoint = open_checkpoint(tmp_path)
    read, small = checkpoint.read("big"), checkpoint.read("small")
    checkpoint.close()
    del checkpoint
    assert torch.equal(read, big)
    assert torch.equal(small, big[:10])


def _memory_mb():
    status = Path("/proc/self/status").read_text()
    return {
        key: int(re.search(rf"{key}:\s+(\d+)", status)[1]) / 1024
        for key in ("RssAnon", "RssFile", "VmData")
    }


@pytest.mark.parametrize("suffix", FORMATS)
def test_what_is_read_is_page_cache_and_never_data_of_the_process(tmp_path, suffix):
    size_mb = 48
    names = [f"layer.{i}" for i in range(4)]
    _single(tmp_path, suffix, {name: torch.ones(size_mb * 2**18) for name in names})
    before = _memory_mb()
    checkpoint = open_checkpoint(tmp_path)
    for name in names:
        assert float(checkpoint.read(name).sum()) == size_mb * 2**18
    after = _memory_mb()
    grown = {key: after[key] - before[key] for key in after}
    assert grown["RssAnon"] < size_mb / 4
    assert grown["VmData"] < size_mb / 4, "the mapping counts against RLIMIT_DATA"
    assert grown["RssFile"] < 2 * size_mb, "tensors read before are still mapped in"


@pytest.mark.parametrize("suffix", FORMATS)
def test_only_the_files_of_wanted_tensors_are_needed(tmp_path, suffix):
    tensors = _tensors()
    first, second = _sharded(tmp_path, suffix, tensors)
    second.unlink()
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.names()) == len(tensors)
    checkpoint.validate([("h.0.weight", (8, 8))])
    with pytest.raises(CheckpointError, match=f"{second.name}.*tensor h.0.bias.*missing") as caught:
        checkpoint.validate([("h.0.weight", (8, 8)), ("h.0.bias", (8,))])
    assert (caught.value.path, caught.value.tensor) == (str(second), "h.0.bias")
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read("h.0.bias")
    assert first.exists()


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_truncated_shard_is_named(tmp_path, suffix):
    _, second = _sharded(tmp_path, suffix, _tensors())
    second.write_bytes(second.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(tmp_path).validate([("h.1.weight", (3, 5))])
    assert caught.value.path == str(second)


def test_a_truncated_safetensors_file_is_named_with_the_tensor(tmp_path):
    file = _single(tmp_path, "safetensors", {"a": torch.ones(4), "b": torch.ones(4)})
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor b: ends at byte"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_tensor_that_is_not_where_the_index_says_is_named(tmp_path, suffix):
    first, _ = _sharded(tmp_path, suffix, _tensors())
    index = _index(tmp_path, suffix)
    content = json.loads(index.read_text())
    content["weight_map"]["ghost"] = first.name
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{first.name}: tensor ghost: the index places it"):
        open_checkpoint(tmp_path).validate([("ghost", (1,))])


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_missing_tensor_and_a_wrong_shape_are_named(tmp_path, suffix):
    file = _single(tmp_path, suffix, _tensors())
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"tensor h\.7\.weight: is in no weight file"):
        checkpoint.validate([("h.7.weight", (8, 8))])
    with pytest.raises(
        CheckpointError,
        match=rf"{file.name}: tensor h.1.weight: expected shape \[5, 3\].*found \[3, 5\]",
    ):
        checkpoint.validate([("h.0.weight", (8, 8)), ("h.1.weight", (5, 3))])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_weights_that_are_stored_quantised_are_refused_when_wanted(tmp_path, suffix, dtype):
    _single(tmp_path, suffix, {"w": torch.ones(2, 2, dtype=dtype), "a": torch.ones(1)})
    checkpoint = open_checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), torch.ones(1))
    with pytest.raises(CheckpointError, match=r"tensor w: is stored as .*fp32, bf16, fp16"):
        checkpoint.validate([("w", (2, 2))])


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.int64])
def test_whole_numbers_are_read_where_they_are_wanted(tmp_path, suffix, dtype):
    stored = torch.tensor([[3, 4]]).to(dtype)
    _single(tmp_path, suffix, {"w": stored, "a": torch.ones(1)})
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.validate([("w", (1, 2)), ("a", (1,))], {"w"})
    assert torch.equal(checkpoint.read("w"), stored)
    with pytest.raises(CheckpointError, match=r"tensor a: .* should hold quantised whole numbers"):
        checkpoint.validate([("a", (1,))], {"a"})


def test_float8_safetensors_are_refused_when_wanted(tmp_path):
    _single(tmp_path, "safetensors", {"w": torch.ones(2, 2).to(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match="stored as F8_E4M3"):
        open_checkpoint(tmp_path).validate([("w", (2, 2))])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000, "\xff\xfe"]
)
def test_a_malformed_index_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text("{}")
    index = _index(tmp_path, "safetensors")
    index.write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(index)


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "", 7, ".."])
def test_an_index_reaches_no_file_outside_its_directory(tmp_path, file):
    (tmp_path / "config.json").write_text("{}")
    _index(tmp_path, "safetensors").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match="tensor a"):
        open_checkpoint(tmp_path).validate([("a", (1,))])


@pytest.mark.parametrize("content", [None, "", "{", "[1]", "null", "\xff"])
def test_a_missing_or_malformed_config_is_named(tmp_path, content):
    _single(tmp_path, "safetensors", _tensors())
    config = tmp_path / "config.json"
    config.unlink()
    if content is not None:
        config.write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_path_without_weights_says_what_is_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights: no model\.safetensors"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="give the model's directory"):
        open_checkpoint(tmp_path / "config.json")


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("content", [b"", b"\0", b"{}", b"PK\x03\x04", b"\xff" * 64, b"\0" * 4096])
def test_a_file_that_is_something_else_is_named(tmp_path, suffix, content):
    file = _single(tmp_path, suffix, _tensors())
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.path == str(file)


def _safetensors(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"[" * 50_000,
        {"a": 1},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}},
        {"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}},
    ],
)
def test_a_safetensors_header_that_cannot_be_is_refused(tmp_path, header):
    file = _single(tmp_path, "safetensors", {"a": torch.zeros(2)})
    file.write_bytes(_safetensors(header, b"\0" * 8))
    with pytest.raises(CheckpointError, match="copy it again"):
        open_checkpoint(tmp_path)


class Evil:
    """A pickle that would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


def test_a_bin_file_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = _single(tmp_path, "bin", {})
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": Evil()}))
    with pytest.raises(CheckpointError, match="asks for"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "pwned").exists()


def test_a_bin_file_before_torch_1_6_is_refused_with_the_remedy(tmp_path):
    file = _single(tmp_path, "bin", {})
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"since 1\.6.*save it as safetensors"):
        open_checkpoint(tmp_path)


def test_a_bin_file_whose_data_is_missing_or_compressed_names_the_tensor(tmp_path):
    file = _single(tmp_path, "bin", {"a": torch.ones(4)})
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    data = next(name for name in members if name.endswith("/data/0"))
    for compression, dropped, problem in (
        (zipfile.ZIP_DEFLATED, None, "compressed"),
        (zipfile.ZIP_STORED, data, "not in the file"),
    ):
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, content in members.items():
                if name != dropped:
                    archive.writestr(name, content)
        with pytest.raises(CheckpointError, match=f"tensor a: .*{problem}"):
            open_checkpoint(tmp_path)


def test_the_error_crosses_a_process_boundary_whole():
    error = CheckpointError("model.safetensors", "h.0.weight", "is short")
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, WorkerError)
    assert str(copy) == "model.safetensors: tensor h.0.weight: is short"
    assert (copy.path, copy.tensor, copy.problem) == (error.path, error.tensor, error.problem)

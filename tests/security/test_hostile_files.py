"""Checkpoints and configuration files that mean harm: none runs code, none takes memory or time
without end, and each is refused with a reason."""

import io
import json
import pickle
import re
import resource
import struct
import subprocess
import time
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import build

from tightfit.cluster.chat import ChatTemplate
from tightfit.cluster.config import read_config_file, serve_config
from tightfit.cluster.errors import ConfigError, InvalidRequestError
from tightfit.cluster.planning.inventory import read_inventory
from tightfit.cluster.tokenizer import load_tokenizer
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.checkpoints import base, torch_bin
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import CheckpointError, UnsupportedModelError

MODEL_CODE = "import pathlib\npathlib.Path({path!r}).touch()\nclass Config: pass\n"


@pytest.fixture
def marker(tmp_path):
    """A file that must not come to be."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists()


class Calls:
    """Pickled, a call of any function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def bin_of(directory, data, compression=zipfile.ZIP_STORED):
    """A .bin file with this pickle."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    with zipfile.ZipFile(directory / "pytorch_model.bin", "w", compression) as archive:
        archive.writestr("archive/data.pkl", data)
    return directory


# -- pickles ---------------------------------------------------------------------------------


def hostile_pickles(marker):
    import os

    command = f"touch {marker}"
    nested = io.BytesIO()
    torch.save({"x": Calls(os.system, command)}, nested)
    return {
        "system": pickle.dumps({"a": Calls(os.system, command)}),
        "exec": pickle.dumps(Calls(exec, f"open({str(marker)!r}, 'w').close()")),
        "subprocess": pickle.dumps([Calls(subprocess.getoutput, command)]),
        "path": pickle.dumps({"a": Calls(Path.touch, Path(marker))}),
        "torch.load": pickle.dumps(Calls(torch.load, nested)),
        "getattr": b"cbuiltins\ngetattr\n(c__builtin__\n__import__\nVos\ntR.",
        "protocol 0": f"cos\nsystem\n(S'{command}'\ntR.".encode(),
        "inst": f"(S'{command}'\nios\nsystem\n.".encode(),
        "stack global": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c"
        + bytes([len(command)]) + command.encode() + b"\x85R.",
        "dotted name": b"\x80\x04\x8c\x0ccollections\x8c\x14OrderedDict.__init__\x93.",
        "extension registry": b"\x80\x02\x82\x01.",
    }  # fmt: skip


@pytest.mark.parametrize("kind", hostile_pickles("x"))
def test_no_pickle_runs_code(tmp_path, marker, kind):
    directory = bin_of(tmp_path / "model", hostile_pickles(marker)[kind])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*cannot be read"):
        open_checkpoint(directory)


def test_the_pickles_of_these_tests_do_run_code_where_they_are_let(tmp_path):
    """Else the test above would prove nothing."""
    marker = tmp_path / "touched"
    for kind in ("system", "exec", "subprocess", "path", "protocol 0", "inst", "stack global"):
        pickle.loads(hostile_pickles(marker)[kind])
        assert marker.exists(), kind
        marker.unlink()


@pytest.mark.parametrize("index", [10_000, 0x3FFFFFFF, 0xFFFFFFFF])
def test_a_pickle_of_few_bytes_takes_no_memory(tmp_path, index):
    """The interpreter would make room for as many memo entries as this operation says."""
    data = b"\x80\x02}r" + struct.pack("<I", index) + b"."
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=f"notes something at index {index}"):
        open_checkpoint(bin_of(tmp_path / "model", data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


def test_a_pickle_that_is_small_only_when_compressed_is_refused(tmp_path):
    data = b"\x80\x02" + b"N0" * (torch_bin.MAX_PICKLE_BYTES // 2) + b"}."
    directory = bin_of(tmp_path / "model", data, zipfile.ZIP_DEFLATED)
    assert (directory / "pytorch_model.bin").stat().st_size < 100_000
    with pytest.raises(CheckpointError, match="at most 67,108,864 are read"):
        open_checkpoint(directory)


def test_a_nest_of_pickled_tuples_is_refused_or_read_and_no_more(tmp_path):
    data = b"\x80\x02}" + b"\x8c\x01a)" + b"\x85" * 1_000_000 + b"s."
    checkpoint = open_checkpoint(bin_of(tmp_path / "model", data))
    assert checkpoint.names() == frozenset()
    checkpoint.close()


def test_safetensors_go_first_and_a_bin_beside_them_is_never_opened(tmp_path, marker):
    directory = bin_of(tmp_path / "model", hostile_pickles(marker)["system"])
    save_file({"a": torch.ones(2)}, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.read("a").tolist() == [1.0, 1.0]
    checkpoint.close()


# -- configs ---------------------------------------------------------------------------------


def test_code_that_a_checkpoint_brings_along_is_never_imported(tmp_path, marker):
    """config.json, tokenizer and model name Python files in the checkpoint, as for
    trust_remote_code."""
    directory = tmp_path / "model"
    model = build("llama", directory)
    code = MODEL_CODE.format(path=str(marker))
    for name in ("modeling_x.py", "configuration_x.py", "tokenization_x.py", "__init__.py"):
        (directory / name).write_text(code)
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_x.Config",
        "AutoModelForCausalLM": "modeling_x.Model",
    }
    config["trust_remote_code"] = True
    (directory / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(model.path)
    assert decoder_config(checkpoint.config).num_layers == config["num_hidden_layers"]
    checkpoint.close()


@pytest.mark.slow
def test_a_tokenizer_that_brings_code_along_is_converted_without_it(tmp_path, marker, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "tokenization_x.py").write_text(MODEL_CODE.format(path=str(marker)))
    (directory / "config.json").write_text(
        json.dumps({"auto_map": {"AutoTokenizer": ["tokenization_x.Config", None]}})
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "X",
                "auto_map": {"AutoTokenizer": ["tokenization_x.Config", None]},
            }
        )
    )
    with pytest.raises(ConfigError, match="cannot be converted"):
        load_tokenizer(directory)


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("value", [10_001, 10**18, 10**400], ids=["some", "many", "endless"])
def test_a_number_of_layers_without_end_is_refused_at_once(family, value):
    config = {
        "model_type": family, "num_hidden_layers": value, "hidden_size": 64, "vocab_size": 32,
        "num_attention_heads": 4, "intermediate_size": 64, "ffn_dim": 64, "n_layer": value,
        "max_position_embeddings": 64, "word_embed_proj_dim": 64, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    started = time.monotonic()
    with pytest.raises(UnsupportedModelError, match="is over 10,000, which no model has"):
        decoder_config(config)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 200_000, " " * 2000 + "{}"])
def test_a_config_that_is_too_deep_or_too_large_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setattr(base, "MAX_JSON_BYTES", 2_000 if content.endswith("{}") else 10**9)
    (tmp_path / "config.json").write_text(content)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"config\.json.*(recursion|more than 2,000 bytes)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch ' ~ path) }}",
        "{{ self.__init__.__globals__ }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages.append('x') }}",
    ],
)
def test_a_chat_template_gets_out_of_its_sandbox_in_none_of_the_known_ways(template, marker):
    chat = ChatTemplate(template, {"path": str(marker)})
    try:
        text = chat.render([{"role": "user", "content": "x"}])
    except InvalidRequestError:
        return
    assert text == ""  # what is not there renders as nothing


# -- YAML ------------------------------------------------------------------------------------


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        "serve: !!python/object/apply:os.system ['touch {marker}']\n",
        "serve: !!python/object/new:subprocess.Popen [['touch', '{marker}']]\n",
        "serve:\n  model: !!python/name:os.system\n",
        "serve: " + "[" * 100_000,
        "serve: " + "{a: " * 100_000,
        f"serve:\n  model: {'x' * 100}\n  stages: " + "[" * 3000 + "]" * 3000 + "\n",
        LAUGHS,
        "serve:\n" + "".join(f"  {line}\n" for line in LAUGHS.splitlines()),
        LAUGHS + "serve: {model: *m}\n",
    ],
    ids=lambda text: repr(text[:40]),
)
def test_a_configuration_file_that_means_harm_is_refused_in_a_few_words(tmp_path, text, marker):
    path = tmp_path / "config.yaml"
    path.write_text(text.replace("{marker}", str(marker)))
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        serve_config(read_config_file(path))
    assert time.monotonic() - started < 20
    assert len(str(caught.value)) < 5000


def test_a_value_that_stands_for_any_amount_is_shown_in_a_few_words(tmp_path):
    path = tmp_path / "config.yaml"
    bomb = LAUGHS.splitlines()
    lines = ["serve:", "  model: m", "  stages:", *(f"    - {{{line}}}" for line in bomb)]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConfigError, match=r"serve\.stages: .* is not a whole number") as caught:
        serve_config(read_config_file(path))
    assert len(str(caught.value)) < 5000
    path.write_text("\n".join(["nodes:", *(f"  - {{{line}}}" for line in bomb)]) + "\n")
    with pytest.raises(ConfigError) as caught:
        read_inventory(path)
    assert len(str(caught.value)) < 5000


def test_a_file_without_end_is_refused():
    with pytest.raises(ConfigError, match="has more than 16,777,216 bytes"):
        read_config_file(Path("/dev/zero"))


def test_nothing_of_the_service_unpickles_or_loads_what_can_run_code():
    """But the reader of .bin files, whose unpickler allows nothing but descriptions."""
    root = Path(__file__).parents[2]
    pattern = re.compile(
        r"\b(pickle|cloudpickle|dill|shelve|marshal)\.loads?\b|\btorch\.load\b|\brecv_pyobj\b"
        r"|allow_pickle=True|trust_remote_code=(?!False)|yaml\.(unsafe|full)_load\b"
        r"|yaml\.load\((?!.*Loader=_UniqueKeyLoader)"
    )
    files = [
        path
        for folder in ("cluster", "workers", "kernels", "src/tightfit/client")
        for path in (root / folder).rglob("*.py")
    ]
    assert len(files) > 100
    assert [path.name for path in files if pattern.search(path.read_text())] == []

"""Writing a quantised checkpoint: what is in it, who can read it, and what a kill leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import quantized_checkpoints
import safetensors.torch
import tiny_models
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from shard_chain import Chain, part, random_tokens, tables
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from tightfit.kernels.formats import Format
from tightfit.kernels.groups import GroupWeight, pack_groups
from tightfit.kernels.hqq import hqq
from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.checkpoints.written import file_hash
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import CheckpointError
from tightfit.workers.quantizer import QuantizeJob, quantize_checkpoint
from tightfit.workers.sensitivity import BLOCK_ROLES, MIX_FORMATS
from tightfit.workers.shard import ShardModel
from tightfit.workers.shard_bytes import format_label, shard_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

FORMATS = ("int8", "int4", "int3")
FILES = tiny_models.LAYERS + 2


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    made = {}

    def get(variant="llama"):
        if variant not in made:
            path = tmp_path_factory.mktemp("m") / variant
            tiny_models.build(variant, path).hf.bfloat16().save_pretrained(path)
            made[variant] = path
        return made[variant]

    return get


def _job(source, target, fmt="int4", **settings):
    return QuantizeJob(source=str(source), target=str(target), format=fmt, **settings)


def _mix_job(source, target, mix=None, **settings):
    return QuantizeJob(source=str(source), target=str(target), mix=mix or MIX, **settings)


def _log_probs(path, fmt, num_stages=2):
    tokens = random_tokens(40, seed=2)
    return Chain(path, num_stages, fmt).log_probs([part(0, tables()[0], 0, tokens)])


def _hashes(path):
    return {file.name: file_hash(file) for file in sorted(path.glob("*.safetensors"))}


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt-350m", "opt-no-bias", "llama-mha-tied"])
def test_what_was_written_is_what_rounding_while_loading_gives(sources, tmp_path, fmt, variant):
    result = quantize_checkpoint(_job(sources(variant), tmp_path / "out", fmt))
    held = _log_probs(tmp_path / "out", "auto")
    dense = _log_probs(sources(variant), fmt)
    torch.testing.assert_close(held, dense, atol=1e-5, rtol=0)
    assert result.num_layers == tiny_models.LAYERS
    assert result.resumed_files == 0
    assert result.written_bytes == sum(
        file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")
    )


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
@pytest.mark.parametrize("fmt", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
@pytest.mark.parametrize("group_size", [16, 0])
def test_transformers_reads_it_and_computes_what_we_do(sources, tmp_path, fmt, variant, group_size):
    quantize_checkpoint(_job(sources(variant), tmp_path / "out", fmt, group_size=group_size))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        dtype=torch.float32,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    chain = Chain(tmp_path / "out", 1, "fp32")
    names = chain.config.names
    for i, layer in enumerate(chain.shards[0].layers):
        name = f"{names.prefixes[0]}{names.mlp_down.format(i=i)}.weight"
        # They widen to bf16 first.
        torch.testing.assert_close(
            layer.weights.mlp_down.weight, theirs.get_parameter(name), atol=1e-6, rtol=2**-8
        )
    tokens = random_tokens(40, seed=2)
    exact = tiny_models.TinyModel(path=tmp_path, hf=theirs.eval()).log_probs(tokens)
    mine = chain.log_probs([part(0, tables()[0], 0, tokens)])
    assert (exact.exp() * (exact - mine)).sum(-1).mean() < 1e-3


def test_the_bits_of_a_weight_count_scales_and_zero_points(sources, tmp_path):
    by_channel = quantize_checkpoint(_job(sources(), tmp_path / "a", "int4", group_size=0))
    in_groups = quantize_checkpoint(_job(sources(), tmp_path / "b", "int4", group_size=16))
    assert in_groups.bits_per_weight == 4 + 20 / 16
    assert 4 < by_channel.bits_per_weight < in_groups.bits_per_weight
    assert quantize_checkpoint(_job(sources(), tmp_path / "c", "int8")).bits_per_weight > 8


@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
@pytest.mark.parametrize(("fmt", "bits"), [("int4", 4), ("int3", 3)])
def test_what_was_fitted_is_held_as_it_was(sources, tmp_path, fmt, bits, variant):
    job = _job(sources(variant), tmp_path / "out", fmt, method="hqq", group_size=16)
    assert quantize_checkpoint(job).bits_per_weight >= bits + (2 if bits == 4 else 1.5)
    source, held = Chain(sources(variant), 1), Chain(tmp_path / "out", 1, "auto")
    widened = Chain(tmp_path / "out", 1, "fp32")
    for i in range(tiny_models.LAYERS):
        weight = source.shards[0].layers[i].weights.mlp_down.weight
        fitted = hqq(weight, bits=bits, group_size=16, has_real_zero=bits == 4)
        mine = widened.shards[0].layers[i].weights.mlp_down.weight
        torch.testing.assert_close(mine, fitted.dequantize(), rtol=0, atol=0)
        packed = held.shards[0].layers[i].weights.mlp_down.weight
        assert isinstance(packed, GroupWeight)
        torch.testing.assert_close(
            packed.dequantize(), pack_groups(fitted).dequantize(), rtol=0, atol=0
        )
    tokens = random_tokens(40, seed=2)
    exact, mine = (chain.log_probs([part(0, tables()[0], 0, tokens)]) for chain in (widened, held))
    assert (exact.exp() * (exact - mine)).sum(-1).mean() < 2e-3


MIX = tuple(
    {role: MIX_FORMATS[(i + j) % 3] for j, role in enumerate(BLOCK_ROLES)}
    for i in range(tiny_models.LAYERS)
)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
def test_of_a_mix_each_layer_is_what_it_is_in_a_checkpoint_of_its_format(
    sources, tmp_path, variant, method
):
    settings = {"group_size": 16, "method": method}
    result = quantize_checkpoint(_mix_job(sources(variant), tmp_path / "mix", **settings))
    mixed = Chain(tmp_path / "mix", 2, "auto")
    alone = {}
    for fmt in FORMATS:
        one = {**settings, "method": "rtn"} if fmt == "int8" else settings
        quantize_checkpoint(_job(sources(variant), tmp_path / fmt, fmt, **one))
        alone[fmt] = [w for shard in Chain(tmp_path / fmt, 2, "auto").shards for w in shard.layers]
    layers = [layer for shard in mixed.shards for layer in shard.layers]
    for i, layer in enumerate(layers):
        for role in BLOCK_ROLES:
            fmt = MIX[i][role]
            held = getattr(layer.weights, role)
            assert held.format is fmt
            same = getattr(alone[fmt][i].weights, role).weight
            for name in ("values", "scale", "packed", "scale_zero"):
                if hasattr(same, name):
                    assert torch.equal(getattr(held.weight, name), getattr(same, name))
    for shard, (first, end) in zip(mixed.shards, ((0, 2), (2, 5)), strict=True):
        predicted = shard_bytes(
            mixed.config, shard.formats, first, end, has_embedding=first == 0, has_head=first > 0
        )
        assert shard.weight_bytes == predicted
    label = format_label(mixed.config, mixed.shards[0].formats)
    assert label == f"int3/int4/int8 mixed, {result.held_bits_per_weight:.2f} bits"


@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
def test_the_compressed_tensors_package_reads_a_mix_without_int3(sources, tmp_path, variant):
    """Layer by layer: transformers 5.23 itself takes all layers to be packed as the first is."""
    swapped = {Format.INT3: Format.INT4}
    mix = tuple({r: swapped.get(f, f) for r, f in layer.items()} for layer in MIX)
    quantize_checkpoint(_mix_job(sources(variant), tmp_path / "out", mix, group_size=16))
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(sources(variant))
    apply_quantization_config(model, QuantizationConfig.model_validate(section))
    tensors = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors.update(safetensors.torch.load_file(file))
    chain = Chain(tmp_path / "out", 1, "fp32")
    names = chain.config.names
    bits = set()
    for i, layer in enumerate(chain.shards[0].layers):
        module = names.prefixes[0] + names.mlp_down.format(i=i)
        scheme = model.get_submodule(module).quantization_scheme
        bits.add(scheme.weights.num_bits)
        packed = {
            name.removeprefix(f"{module}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{module}.weight")
        }
        theirs = BaseCompressor.get_value_from_registry(scheme.format).decompress(packed, scheme)
        # They widen to bf16.
        torch.testing.assert_close(
            layer.weights.mlp_down.weight, theirs["weight"].float(), atol=1e-6, rtol=2**-8
        )
    assert bits == {4, 8}


def test_a_mix_of_one_format_is_written_as_that_format_is(sources, tmp_path):
    quantize_checkpoint(_job(sources(), tmp_path / "one", "int4"))
    mix = ({role: Format.INT4 for role in BLOCK_ROLES},) * tiny_models.LAYERS
    quantize_checkpoint(_mix_job(sources(), tmp_path / "mix", mix))
    assert _hashes(tmp_path / "mix") == _hashes(tmp_path / "one")
    configs = [(tmp_path / name / "config.json").read_text() for name in ("mix", "one")]
    assert configs[0] == configs[1]


def test_a_zero_point_that_is_not_finite_is_named(sources, tmp_path):
    quantize_checkpoint(_job(sources(), tmp_path / "out", method="hqq"))
    file = tmp_path / "out" / f"model-00002-of-{FILES:05}.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight_zero_point"))
    tensors[name][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"o_proj.*zero point is NaN or infinite"):
        Chain(tmp_path / "out", 1, "auto")


def test_a_stage_opens_the_files_of_its_own_layers_only(sources, tmp_path):
    quantize_checkpoint(_job(sources(), tmp_path / "out"))
    whole = Chain(tmp_path / "out", 1, "auto").shards[0]
    for number in (1, 2, 3, 6, 7):  # all but layers 2 and 3
        (tmp_path / "out" / f"model-{number:05}-of-{FILES:05}.safetensors").unlink()
    checkpoint = open_checkpoint(tmp_path / "out")
    spec = StageSpec(
        model_path=str(tmp_path / "out"), stage_index=1, num_stages=3, first_layer=2, end_layer=4,
        format="auto",
    )  # fmt: skip
    shard = ShardModel.load(checkpoint, decoder_config(checkpoint.config), spec)
    for mine, same in zip(shard.layers, whole.layers[2:4], strict=True):
        assert torch.equal(mine.weights.qkv.weight.packed, same.weights.qkv.weight.packed)


def test_progress_ends_at_the_bytes_that_were_announced(sources, tmp_path):
    reports = []
    result = quantize_checkpoint(_job(sources(), tmp_path / "out"), reports.append)
    done = [report.bytes_done for report in reports]
    assert done == sorted(done)
    assert {report.bytes_total for report in reports} == {result.source_bytes}
    assert done[-1] == result.source_bytes
    assert [report.message for report in reports][:3] == ["embedding", "layer 0", "layer 1"]


RUN = """
import json, sys
from tightfit.workers.quantizer import QuantizeJob, quantize_checkpoint
def report(progress):
    print(progress.message, flush=True)
    if progress.message == "layer 3":
        sys.stdin.readline()
quantize_checkpoint(QuantizeJob(**json.loads(sys.argv[1])), report)
"""


def test_after_a_kill_finished_layers_are_kept_and_the_rest_is_written(sources, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    quantize_checkpoint(_job(sources(), whole))
    job = {"source": str(sources()), "target": str(out), "format": "int4"}
    with subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(job)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.strip() == "layer 3":
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()  # nothing that looks like a model
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(kept) == 4
    (out / "model-00009.safetensors.part").write_text("torn")  # as a kill within a write leaves
    result = quantize_checkpoint(_job(sources(), out))
    assert result.resumed_files == 4
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert _hashes(out) == _hashes(whole)
    assert not list(out.glob("*.part"))
    assert (out / "config.json").read_text() == (whole / "config.json").read_text()


def test_a_finished_file_that_was_damaged_is_written_again(sources, tmp_path):
    quantize_checkpoint(_job(sources(), tmp_path / "out"))
    before = _hashes(tmp_path / "out")
    file = tmp_path / "out" / f"model-00003-of-{FILES:05}.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    result = quantize_checkpoint(_job(sources(), tmp_path / "out"))
    assert result.resumed_files == FILES - 1
    assert _hashes(tmp_path / "out") == before


def test_a_directory_with_something_else_in_it_is_left_alone(sources, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty \(notes.txt\)"):
        quantize_checkpoint(_job(sources(), tmp_path))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "change", [{"fmt": "int3"}, {"group_size": 16}, {"method": "hqq"}, {"source": "bloom"}]
)
def test_the_beginning_of_another_job_is_not_gone_on_with(sources, tmp_path, change):
    quantize_checkpoint(_job(sources(), tmp_path / "out"))
    before = _hashes(tmp_path / "out")
    source = sources(change.pop("source", "llama"))
    with pytest.raises(CheckpointError, match="holds the beginning of another job"):
        quantize_checkpoint(_job(source, tmp_path / "out", **change))
    assert _hashes(tmp_path / "out") == before


def test_the_beginning_of_another_mix_is_not_gone_on_with(sources, tmp_path):
    quantize_checkpoint(_mix_job(sources(), tmp_path / "out"))
    assert quantize_checkpoint(_mix_job(sources(), tmp_path / "out")).resumed_files == FILES
    with pytest.raises(CheckpointError, match="holds the beginning of another job"):
        quantize_checkpoint(_mix_job(sources(), tmp_path / "out", (*MIX[1:], MIX[0])))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"identity": 1, "files": 2}'])
def test_a_damaged_manifest_is_named(sources, tmp_path, content):
    (tmp_path / "quantize.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"quantize\.json: cannot be read .* begin again"):
        quantize_checkpoint(_job(sources(), tmp_path))


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(sources, tmp_path):
    quantized_checkpoints.build("gptq", "llama", tmp_path / "gptq")
    with pytest.raises(CheckpointError, match="is quantised already, by gptq"):
        quantize_checkpoint(_job(tmp_path / "gptq", tmp_path / "out"))
    with pytest.raises(CheckpointError, match="48 input features, which groups of 36 do not"):
        quantize_checkpoint(_job(sources(), tmp_path / "out", group_size=36))
    with pytest.raises(CheckpointError, match="int8 is rounded to nearest; hqq is for int4 and"):
        quantize_checkpoint(_job(sources(), tmp_path / "out", "int8", method="hqq"))
    with pytest.raises(CheckpointError, match="has 5 layers, and the mix of formats is for 4"):
        quantize_checkpoint(_mix_job(sources(), tmp_path / "out", MIX[1:]))
    with pytest.raises(CheckpointError, match="wants one format, or else a mix of them"):
        quantize_checkpoint(_mix_job(sources(), tmp_path / "out", format="int4"))
    with pytest.raises(CheckpointError, match="gptq needs samples to calibrate with"):
        quantize_checkpoint(_job(sources(), tmp_path / "out", method="gptq"))
    with pytest.raises(CheckpointError, match="is the source; choose another directory"):
        quantize_checkpoint(_job(sources(), sources()))
    assert not (tmp_path / "out").exists()
    assert Path(sources(), "config.json").exists()

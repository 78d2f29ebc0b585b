"""GPTQ of a whole model: against transformers' activations, and what a kill leaves."""

import json
import signal
import subprocess
import sys

import pytest
import tiny_models
import torch
from shard_chain import Chain, part, random_tokens, tables

from tightfit.kernels.gptq import factor_hessian, fit_grid, gptq
from tightfit.kernels.groups import pack_groups
from tightfit.workers.calibration import Calibration
from tightfit.workers.checkpoints.written import file_hash
from tightfit.workers.errors import CheckpointError
from tightfit.workers.quantizer import QuantizeJob, quantize_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLES = tuple(tuple(random_tokens(40, seed=seed)) for seed in range(24))
CALIBRATION = Calibration(samples=SAMPLES)


def _source(variant, path):
    model = tiny_models.build(variant, path).hf.bfloat16()
    model.save_pretrained(path)
    return model.float()


def _job(source, target, fmt="int4", calibration=CALIBRATION, **settings):
    return QuantizeJob(
        source=str(source),
        target=str(target),
        format=fmt,
        method="rtn" if calibration is None else "gptq",
        calibration=calibration,
        **settings,
    )


def _hashes(path):
    return {file.name: file_hash(file) for file in sorted(path.glob("*.safetensors"))}


@torch.no_grad()
def _hessian(model, module):
    """Of what transformers gives a module."""
    seen = []
    hook = module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for sample in SAMPLES:
        model(torch.tensor([sample]))
    hook.remove()
    x = torch.cat([one.flatten(0, -2) for one in seen]).double()
    return (x.t() @ x).float()


def _loss(error, hessian):
    return float((error.double() @ hessian.double() * error).sum())


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    "variant", ["llama", "llama-biases", "bloom", "bloom-residual-after-norm", "opt", "opt-350m"]
)
def test_every_layer_is_rounded_for_the_inputs_that_transformers_gives_it(
    tmp_path, variant, act_order
):
    theirs = _source(variant, tmp_path / "in").eval()
    calibration = Calibration(samples=SAMPLES, act_order=act_order)
    quantize_checkpoint(
        _job(tmp_path / "in", tmp_path / "out", calibration=calibration, group_size=16)
    )
    written = Chain(tmp_path / "out", 1, "fp32")
    n = written.config.names
    for i in range(2):
        ours = written.shards[0].layers[i].weights
        for names, linear in (
            (n.qkv, ours.qkv), ((n.attn_out,), ours.attn_out), (n.mlp_up, ours.mlp_up),
            ((n.mlp_down,), ours.mlp_down),
        ):  # fmt: skip
            modules = [theirs.get_submodule(n.prefixes[0] + name.format(i=i)) for name in names]
            weight = torch.cat([module.weight.detach() for module in modules])
            inputs = _hessian(theirs, modules[0])
            hessian = inputs.clone()
            scale, zero_point = fit_grid(weight, hessian.diagonal(), bits=4, group_size=16)
            factor, order = factor_hessian(hessian, act_order=act_order)
            rounded = gptq(weight, factor, order, bits=4, scale=scale, zero_point=zero_point)
            expected = pack_groups(rounded).dequantize()
            held = linear.weight
            if variant.startswith("bloom") and names is n.qkv:
                heads, size = written.config.num_heads, written.config.head_dim
                held = held.view(3, heads, size, -1).transpose(0, 1).reshape(expected.shape)
            # Inputs differ in their last bits: a value that lies halfway goes either way, and with
            # it those that make up for it. The loss tells that from another algorithm.
            is_same = (held - expected).abs() < 1e-2 * scale.float().repeat_interleave(16, 1)
            assert is_same.float().mean() > 0.9, (i, names)
            loss = _loss(held - weight, inputs)
            assert loss == pytest.approx(_loss(expected - weight, inputs), rel=0.02), (i, names)
            parts = held.split([len(module.weight) for module in modules])
            for module, weights in zip(modules, parts, strict=True):
                module.weight.data.copy_(weights)


@pytest.mark.parametrize("fmt", ["int4", "int3"])
@pytest.mark.parametrize("variant", ["llama", "bloom", "opt"])
def test_the_model_is_nearer_to_the_original_than_rounded_to_nearest(tmp_path, variant, fmt):
    theirs = tiny_models.TinyModel(path=tmp_path, hf=_source(variant, tmp_path / "in").eval())
    held_out = [random_tokens(40, seed=seed) for seed in range(100, 110)]
    losses = []
    for name, calibration in (("nearest", None), ("gptq", CALIBRATION)):
        out = tmp_path / name
        quantize_checkpoint(_job(tmp_path / "in", out, fmt, calibration, group_size=16))
        chain = Chain(out, 1, "fp32")
        loss = 0.0
        for tokens in held_out:
            exact, mine = (
                theirs.log_probs(tokens),
                chain.log_probs([part(0, tables()[0], 0, tokens)]),
            )
            loss += float((exact.exp() * (exact - mine)).sum(-1).mean())
        losses.append(loss)
    assert losses[1] < 0.8 * losses[0]


RUN = """
import json, sys
from tightfit.workers.calibration import Calibration
from tightfit.workers.quantizer import QuantizeJob, quantize_checkpoint
def report(progress):
    print(progress.message, flush=True)
    if progress.message == sys.argv[2]:
        sys.stdin.readline()
job = json.loads(sys.argv[1])
calibration = Calibration(samples=job.pop("samples"))
quantize_checkpoint(QuantizeJob(method="gptq", calibration=calibration, **job), report)
"""


def _killed_at(message, source, out):
    job = {
        "source": str(source), "target": str(out), "format": "int4", "samples": SAMPLES,
    }  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", RUN, json.dumps(job), message],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.strip() == message:
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("message", ["layer 2", "layer 2: mlp_up", "layer 2: outputs", "layer 3"])
def test_after_a_kill_it_goes_on_from_the_finished_layers(tmp_path, message):
    source, whole, out = tmp_path / "in", tmp_path / "whole", tmp_path / "out"
    _source("llama", source)
    quantize_checkpoint(_job(source, whole))
    _killed_at(message, source, out)
    kept = {file.name: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    assert len(kept) == 1 + int(message[6])  # the embedding, and the layers before
    assert not (out / "config.json").exists()
    messages = []
    result = quantize_checkpoint(_job(source, out), lambda report: messages.append(report.message))
    assert result.resumed_files == len(kept)
    assert f"layer {int(message[6]) - 1}: qkv" not in messages
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert _hashes(out) == _hashes(whole)
    assert not [file for file in out.iterdir() if file.name.startswith("calibration-")]


def test_without_the_hidden_states_of_an_earlier_run_it_begins_again(tmp_path):
    source, whole, out = tmp_path / "in", tmp_path / "whole", tmp_path / "out"
    _source("llama", source)
    quantize_checkpoint(_job(source, whole))
    _killed_at("layer 3", source, out)
    for file in out.glob("calibration-*.states"):
        file.write_bytes(b"torn")
    result = quantize_checkpoint(_job(source, out))
    assert result.resumed_files == 1  # the embedding
    assert _hashes(out) == _hashes(whole)


def test_a_finished_model_is_left_as_it_is(tmp_path):
    _source("llama", tmp_path / "in")
    quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out"))
    messages = []
    result = quantize_checkpoint(
        _job(tmp_path / "in", tmp_path / "out"), lambda report: messages.append(report.message)
    )
    assert result.resumed_files == tiny_models.LAYERS + 2
    assert not [message for message in messages if ":" in message]


@pytest.mark.parametrize(
    "change",
    [
        {"samples": SAMPLES[:5]},
        {"samples": SAMPLES, "damping": 0.1},
        {"samples": SAMPLES, "act_order": False},
        None,
    ],
)
def test_another_calibration_is_another_job(tmp_path, change):
    _source("llama", tmp_path / "in")
    quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out"))
    calibration = None if change is None else Calibration(**change)
    with pytest.raises(CheckpointError, match="method or calibration"):
        quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out", calibration=calibration))


def test_few_tokens_and_little_damping_are_enough(tmp_path):
    """24 features' worth of inputs leave a Hessian of 48 without a factor: damping is raised."""
    _source("llama", tmp_path / "in")
    calibration = Calibration(samples=SAMPLES[:1], damping=0.0)
    result = quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out", calibration=calibration))
    assert result.num_layers == tiny_models.LAYERS
    assert torch.isfinite(
        Chain(tmp_path / "out", 1, "auto").log_probs([part(0, tables()[0], 0, list(SAMPLES[0]))])
    ).all()


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, bad):
    model = tiny_models.build("llama", tmp_path / "in").hf
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float(bad)
    model.save_pretrained(tmp_path / "in")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj.*entry in row 3"):
        quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out"))
    assert not (tmp_path / "out" / "config.json").exists()


def test_int8_takes_no_calibration(tmp_path):
    _source("llama", tmp_path / "in")
    with pytest.raises(
        CheckpointError, match="int8 is rounded to nearest; gptq is for int4 and int3"
    ):
        quantize_checkpoint(_job(tmp_path / "in", tmp_path / "out", "int8"))
    assert not (tmp_path / "out").exists()

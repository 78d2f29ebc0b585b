"""`tightfit quantize`, then `tightfit serve` of what it wrote."""

import json
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
from served import Served, save_model
from shard_chain import Chain, part, random_tokens, tables
from tiny_models import LAYERS

from tightfit.client import Client
from tightfit.cluster.planning.mix import mix_for_bits
from tightfit.workers.sensitivity import BLOCK_ROLES, MIX_FORMATS, load_sensitivities

pytestmark = pytest.mark.slow


def quantize(*arguments):
    command = [sys.executable, "-m", "tightfit.cluster.cli", "quantize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_a_model_quantised_by_the_command_line_is_served_as_it_was_written(tmp_path):
    model = save_model("llama", tmp_path / "model")
    config = tmp_path / "tightfit.yaml"
    section = {"model": str(model.path), "out": str(tmp_path / "out"), "group_size": "16"}
    config.write_text(json.dumps({"quantize": section}))
    done = quantize("--config", config, "--format", "int4", "--json")
    assert done.returncode == 0, done.stderr
    assert "model: quantising 0 bytes of" in done.stderr
    assert json.loads(done.stdout)["bits_per_weight"] == 4 + 20 / 16
    tokens = random_tokens(60, seed=8)
    exact = Chain(tmp_path / "out", 1, "auto").log_probs([part(0, tables()[0], 0, tokens)])
    with Served(tmp_path / "out", "--stages", "2") as served, Client(served.target) as client:
        assert client.model().weight_format == "int4"
        scores = client.score(tokens)
        stages = client.status().stages
        assert served.stop(signal.SIGTERM, limit_s=60) == 0
        assert "as int4 on 2 stage(s)" in served.errors
    expected = [float(exact[i, token]) for i, token in enumerate(tokens[1:])]
    assert scores.logprobs == pytest.approx(expected, abs=0.1)
    assert [stage.format for stage in stages] == ["int4", "int4"]
    for stage in stages:
        assert stage.memory.predicted_weight_bytes == stage.memory.weight_bytes


def test_a_calibration_text_brings_the_model_nearer_to_the_original(tmp_path):
    model = save_model("llama", tmp_path / "model")
    random_text(tmp_path / "text")
    flags = ("--format", "int4", "--group-size", "16", "--json")
    calibrate = ("--calibration", tmp_path / "text", "--samples", 40, "--sample-tokens", 64)
    for name, more in (("nearest", ()), ("gptq", calibrate)):
        done = quantize(model.path, tmp_path / name, *flags, *more)
        assert done.returncode == 0, done.stderr
    assert "calibration text through the embedding" in done.stderr
    done = quantize(
        model.path,
        tmp_path / "hard",
        *flags,
        *calibrate,
        "--samples",
        20,
        "--sample-choice",
        "hard",
    )
    assert done.returncode == 0, done.stderr
    losses = {"nearest": 0.0, "gptq": 0.0, "hard": 0.0}
    for name in losses:
        chain = Chain(tmp_path / name, 1, "fp32")
        for seed in range(10):
            tokens = random_tokens(60, seed=seed)
            exact = model.log_probs(tokens)
            mine = chain.log_probs([part(0, tables()[0], 0, tokens)])
            losses[name] += float((exact.exp() * (exact - mine)).sum(-1).mean())
    assert losses["gptq"] < 0.9 * losses["nearest"]
    assert losses["hard"] < losses["nearest"]


def test_gptq_without_a_text_and_a_text_without_gptq_are_refused(tmp_path):
    model = save_model("llama", tmp_path / "model")
    missing = quantize(model.path, tmp_path / "out", "--method", "gptq")
    assert missing.returncode == 1
    assert "gptq needs a text to calibrate with" in missing.stderr
    unused = quantize(
        model.path, tmp_path / "out", "--method", "rtn", "--calibration", tmp_path / "text"
    )
    assert unused.returncode == 1
    assert "quantize.calibration is for gptq" in unused.stderr
    assert not (tmp_path / "out").exists()


def random_text(path, count=3000):
    alphabet = [chr(letter) for letter in range(33, 127)]
    path.write_text("".join(random.Random(1).choices(alphabet, k=count)))
    return path


MEASURE = ("--measure-tokens", 200, "--group-size", 16)


def test_a_mix_within_a_budget_is_written_and_served_in_its_formats(tmp_path):
    model, out = save_model("llama", tmp_path / "model"), tmp_path / "out"
    text = ("--calibration", random_text(tmp_path / "text"), "--method", "hqq", *MEASURE)
    done = quantize(model.path, out, "--budget", 6.5, *text, "--json")
    assert done.returncode == 0, done.stderr
    assert "model: measuring 0 bytes of" in done.stderr
    result = json.loads(done.stdout)
    sensitivities = load_sensitivities(out / "sensitivity.json")
    mix = mix_for_bits(sensitivities, 6.5)
    counts = Counter(fmt for layer in mix for fmt in layer.values())
    assert result["mix"] == {fmt: counts[fmt] for fmt in MIX_FORMATS if counts[fmt]}
    assert len(result["mix"]) > 1
    held = Chain(out, 1, "auto")
    layers = held.shards[0].layers
    for layer, formats in zip(layers, mix, strict=True):
        assert {role: getattr(layer.weights, role).format for role in formats} == formats
    used = sum(getattr(w.weights, role).weight.nbytes for w in layers for role in BLOCK_ROLES)
    budget = 6.5 * sensitivities.num_weights / 8
    largest = max(
        unit.formats["int8"].bytes - unit.formats["int3"].bytes for unit in sensitivities.units
    )
    assert budget - largest < used <= budget
    assert result["held_bits_per_weight"] == 8 * used / sensitivities.num_weights
    label = f"{'/'.join(result['mix'])} mixed, {result['held_bits_per_weight']:.2f} bits"
    with Served(out, "--stages", "2") as served, Client(served.target) as client:
        assert client.model().weight_format == label
        assert len(client.score(random_tokens(60, seed=8)).logprobs) == 59
        stages = client.status().stages
        assert served.stop(signal.SIGTERM, limit_s=60) == 0
        assert f"as {label} on 2 stage(s)" in served.errors
    for stage in stages:
        assert stage.memory.predicted_weight_bytes == stage.memory.weight_bytes


def test_what_was_measured_once_serves_many_budgets(tmp_path):
    model, measured = save_model("llama", tmp_path / "model"), tmp_path / "measured"
    text = ("--calibration", random_text(tmp_path / "text"))
    samples = ("--samples", 8, "--sample-tokens", 64)
    done = quantize(model.path, measured, "--measure", *text, *samples, *MEASURE, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["path"] == str(measured / "sensitivity.json")
    assert summary["divergence"]["int3"] > summary["divergence"]["int4"]
    assert [file.name for file in measured.iterdir()] == ["sensitivity.json"]
    shown = quantize(model.path, measured, "--measure", *text, *samples, *MEASURE).stdout
    assert f"sensitivity.json: {4 * LAYERS} units, on 199 tokens, loss " in shown
    assert "Most sensitive to int3: layer " in shown
    file = ("--sensitivity", measured / "sensitivity.json")
    bits = []
    for budget in (6.1, 7.0):
        flags = ("--budget", budget, *file, *text, *samples, "--json")
        done = quantize(model.path, tmp_path / str(budget), *flags)
        assert done.returncode == 0, done.stderr
        bits.append(json.loads(done.stdout)["held_bits_per_weight"])
    assert bits[0] <= 6.1 < bits[1] <= 7.0
    # In the directory where it was measured, it is found, and a run goes on where it was.
    for resumed in (0, LAYERS + 2):
        flags = ("--budget", 6, *text, *samples, *MEASURE, "--json")
        done = quantize(model.path, measured, *flags)
        assert done.returncode == 0, done.stderr
        assert "measuring" not in done.stderr
        assert json.loads(done.stdout)["resumed_files"] == resumed


def test_a_budget_that_cannot_be_kept_or_has_nothing_to_go_by_is_refused(tmp_path):
    model, other = save_model("llama", tmp_path / "model"), save_model("opt", tmp_path / "other")
    text = ("--calibration", random_text(tmp_path / "text"), "--method", "rtn", *MEASURE)
    out = tmp_path / "out"
    nothing = quantize(model.path, out, "--budget", 4)
    assert nothing.returncode == 1
    assert "there is no" in nothing.stderr
    assert "give a text to measure them with" in nothing.stderr
    short = quantize(model.path, out, "--measure", *text, "--measure-tokens", 2000)
    assert "of which 1536 are more than half" in short.stderr
    assert not out.exists()
    few = quantize(model.path, out, "--budget", 3.5, *text)
    assert few.returncode == 1
    assert "3.5 bits per weight are too few: int3 alone takes" in few.stderr
    file = ("--sensitivity", out / "sensitivity.json")
    foreign = quantize(other.path, tmp_path / "new", "--budget", 6, *file)
    assert "was measured on another model than" in foreign.stderr
    grouped = quantize(model.path, tmp_path / "new", "--budget", 6, *file, "--group-size", 48)
    assert "was measured with 16; leave it out" in grouped.stderr
    unused = quantize(model.path, tmp_path / "new", "--budget", 6, *file, *text[:4])
    assert "quantize.calibration is for gptq; rtn takes none" in unused.stderr
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_quantised_exits_with_1_and_a_reason_and_wrong_usage_with_2(tmp_path):
    missing = quantize(tmp_path / "nothing", tmp_path / "out")
    assert missing.returncode == 1
    assert "no such directory or GGUF file" in missing.stderr
    wrong = quantize("m", tmp_path / "out", "--group-size", "none")
    assert wrong.returncode == 2
    assert "neither a number of features, nor auto or channel" in wrong.stderr
    assert not (tmp_path / "out").exists()

"""`tightfit quantize`, then `tightfit serve` of what it wrote."""

import json
import random
import signal
import subprocess
import sys

import pytest
from served import Served, save_model
from shard_chain import Chain, part, random_tokens, tables

from tightfit.client import Client

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
    alphabet = [chr(letter) for letter in range(33, 127)]
    text = "".join(random.Random(1).choices(alphabet, k=3000))
    (tmp_path / "text").write_text(text)
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


def test_what_cannot_be_quantised_exits_with_1_and_a_reason_and_wrong_usage_with_2(tmp_path):
    missing = quantize(tmp_path / "nothing", tmp_path / "out")
    assert missing.returncode == 1
    assert "no such directory or GGUF file" in missing.stderr
    wrong = quantize("m", tmp_path / "out", "--group-size", "none")
    assert wrong.returncode == 2
    assert "neither a number of features, nor auto or channel" in wrong.stderr
    assert not (tmp_path / "out").exists()

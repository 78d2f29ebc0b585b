import os
import random
import signal
import subprocess
import sys
import threading
import time

import grpc
import psutil
import pytest
import tiny_models
from served import Served, save_model, wait_for

from tightfit.client import Client, TightfitRpcError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def served(model):
    with Served(model.path, "--format", "fp32", "--stages", "3", "--kv-blocks", "64") as served:
        yield served


@pytest.fixture
def client(served):
    with Client(served.target, timeout_s=60) as client:
        yield client


def prompt(length, seed=0):
    generator = random.Random(seed)
    return [generator.randrange(tiny_models.VOCAB) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 40, 300])
def test_tokens_through_three_stages_are_those_of_transformers(model, client, length):
    chunks = list(client.stream(prompt(length), max_tokens=24))
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert tokens == model.greedy(prompt(length), 24)
    assert [chunk.token_offset for chunk in chunks] == sorted({c.token_offset for c in chunks})
    assert chunks[-1].finish_reason == "length"


@pytest.mark.parametrize("length", [2, 50, 400])
def test_scores_are_those_of_transformers(model, client, length):
    text = prompt(length, seed=1)
    scores = client.score(text)
    exact = model.log_probs(text)
    expected = [float(exact[i, token]) for i, token in enumerate(text[1:])]
    assert scores.token_ids == tuple(text)
    assert scores.logprobs == pytest.approx(expected, abs=1e-3)


def test_many_streams_at_once_do_not_touch_each_other(model, client):
    prompts = [prompt(3 + 11 * i, seed=i) for i in range(12)]
    results = {}

    def run(i):
        results[i] = client.generate(prompts[i], max_tokens=20).token_ids

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, text in enumerate(prompts):
        assert list(results[i]) == model.greedy(text, 20), i


def test_status_shows_predicted_and_measured_memory_of_every_stage(client):
    status = client.status()
    assert status.stages[0].first_layer == 0
    assert status.stages[-1].end_layer == tiny_models.LAYERS
    for stage in status.stages:
        assert stage.memory.weight_bytes == stage.memory.predicted_weight_bytes > 0
        assert stage.memory.kv_cache_bytes > 0


def test_a_client_that_leaves_frees_its_blocks(served, client):
    stream = client.stream(prompt(20, seed=5), max_tokens=400, ignore_eos=True)
    next(stream)
    assert client.status().load.kv_blocks_used > 0
    stream.close()
    assert wait_for(lambda: client.status().load.kv_blocks_used == 0)


def test_a_deadline_ends_the_call_and_frees_its_blocks(served, client):
    with Client(served.target, timeout_s=0.05) as hasty, pytest.raises(TightfitRpcError) as caught:
        hasty.generate(prompt(20, seed=6), max_tokens=480, ignore_eos=True)
    assert caught.value.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert wait_for(lambda: client.status().load.kv_blocks_used == 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_everything_within_ten_seconds(model, number):
    served = Served(model.path, "--format", "int8", "--stages", "2")
    with served:
        assert len(served.stage_pids()) == 2
        started = time.monotonic()
        assert served.stop(number, limit_s=30) == 0
        assert time.monotonic() - started < 10
        assert served.left_behind() == []


def test_an_interrupt_while_loading_leaves_nothing_behind(model):
    served = Served(model.path, "--stages", "2", wait=False)
    with served:
        process = psutil.Process(served.process.pid)
        assert wait_for(lambda: len(process.children(recursive=True)) > 2, limit_s=60)
        assert served.stop(signal.SIGINT, limit_s=30) != 0
        assert served.left_behind() == []


def test_sigterm_lets_running_streams_finish(model):
    with Served(model.path, "--format", "fp32", "--stages", "1") as served:
        with Client(served.target, timeout_s=60) as client:
            stream = client.stream(prompt(10), max_tokens=300, ignore_eos=True)
            tokens = list(next(stream).token_ids)
            served.remember()
            served.process.send_signal(signal.SIGTERM)
            for chunk in stream:
                tokens += chunk.token_ids
        assert len(tokens) == 300
        assert served.process.wait(timeout=30) == 0


def run_serve(*flags):
    command = [sys.executable, "-m", "tightfit.cluster.cli", "serve", *flags]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", "6"), "6 stages"),
        (("--stages", "1", "--memory-budget", "20KiB"), "budget"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(model, flags, message):
    done = run_serve(str(model.path), "--listen", "127.0.0.1:0", *flags)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_named_with_its_file(model, tmp_path):
    for file in model.path.iterdir():
        data = file.read_bytes()
        cut = len(data) - 100 if file.suffix == ".safetensors" else len(data)
        (tmp_path / file.name).write_bytes(data[:cut])
    done = run_serve(str(tmp_path), "--listen", "127.0.0.1:0", "--stages", "1")
    assert done.returncode == 1
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr

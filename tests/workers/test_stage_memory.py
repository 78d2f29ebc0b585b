import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tightfit.workers.api import MicroBatch, SamplingSpec, SequenceSlice, StageSpec
from tightfit.workers.errors import BudgetError, StageError
from tightfit.workers.link import StepMessage
from tightfit.workers.stage import Stage

LAYER_ELEMENTS = 4 * 1024 * 1024 + 3 * 1024 * 3072
MEASURE = """
import json, sys, threading, time
from tightfit.workers.api import StageSpec
from tightfit.workers import stage as s
from tightfit.workers.stage_memory import rss_anon_bytes
import torch
torch.set_num_threads(1)
torch.nn.functional.linear(torch.zeros(4, 64), torch.zeros(64, 64))
before, peak, done = rss_anon_bytes(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], rss_anon_bytes())
thread = threading.Thread(target=watch); thread.start()
stage = s.Stage(StageSpec(**json.loads(sys.argv[1])))
done.set(); thread.join()
print(json.dumps({"peak": peak[0] - before, "held": stage.model.weight_bytes}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """12 layers of 54 MB in fp32, in several files."""
    path = tmp_path_factory.mktemp("big") / "model"
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=8,
        vocab_size=512, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="200MB")
    return path


def spec(path, **changes):
    fields = {
        "model_path": str(path), "stage_index": 0, "num_stages": 1, "first_layer": 0,
        "end_layer": 12, "format": "int8", "num_kv_blocks": 1, "max_batch_tokens": 32,
        "num_threads": 1,
    }  # fmt: skip
    return {**fields, **changes}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["int8", "bf16"])
def test_loading_holds_one_layer_at_most_in_full_precision(checkpoint, fmt):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(spec(checkpoint, format=fmt))],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["peak"] < measured["held"] + 4 * LAYER_ELEMENTS + 300 * 2**20


def test_a_shard_over_its_budget_is_refused_with_the_sizes(checkpoint):
    with pytest.raises(BudgetError, match=r"stage 0 .*for weights.*for workspace.*its budget is"):
        Stage(StageSpec(**spec(checkpoint, memory_budget_bytes=100 * 2**20)))


def stage_memory(arguments):
    """Total bytes and KV blocks of a stage in a process of its own."""
    code = MEASURE + "m = stage.memory()\nprint(json.dumps([m.total_bytes, m.num_kv_blocks]))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_kv_cache_takes_what_the_budget_leaves_and_int8_nearly_twice_the_tokens(checkpoint):
    budget, blocks = 500 * 2**20, {}
    for kv_format, vector_bytes in (("auto", 128 * 2), ("int8", 128 + 2)):
        total, blocks[kv_format] = stage_memory(
            spec(
                checkpoint, num_kv_blocks=None, max_kv_blocks=10**6, memory_budget_bytes=budget,
                kv_format=kv_format,
            )
        )  # fmt: skip
        block_bytes = 12 * 16 * 2 * 8 * vector_bytes
        assert budget - block_bytes < total <= budget
    assert blocks["auto"] > 100
    assert blocks["int8"] > 1.8 * blocks["auto"]


@pytest.mark.slow
def test_the_kernel_refuses_memory_far_beyond_the_budget(checkpoint):
    code = MEASURE + (
        "try:\n    torch.ones(2**30)\nexcept RuntimeError as error:\n    print('refused', error)"
    )
    arguments = spec(checkpoint, memory_budget_bytes=400 * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("refused")


def step(number, *, epoch=1):
    part = SequenceSlice(
        sequence_id=1, start_position=0, token_ids=[1], block_table=[0], sampling=SamplingSpec()
    )
    return StepMessage(batch=MicroBatch(epoch=epoch, step=number, slices=[part]))


def test_a_stage_computes_each_step_of_its_epoch_once_and_in_order(checkpoint):
    stage = Stage(StageSpec(**spec(checkpoint, first_layer=0, end_layer=1)))
    stage.begin_epoch(1)
    assert not stage.accepts(step(0, epoch=0).batch)
    assert stage.accepts(step(0).batch)
    result, _ = stage.compute(step(0), memoryview(b""))
    assert (result.epoch, result.step, len(result.tokens)) == (1, 0, 1)
    for wrong in (0, 2):
        with pytest.raises(StageError, match=f"expected step 1 .*received {wrong}"):
            stage.accepts(step(wrong).batch)
    stage.begin_epoch(2)
    assert not stage.accepts(step(1).batch)
    assert stage.accepts(step(0, epoch=2).batch)

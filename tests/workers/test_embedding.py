"""The embedding's table on the host: the same tokens, without its bytes."""

import json
import resource
import subprocess
import sys

import pytest
import tiny_models
import torch
from harness import gguf
from safetensors.torch import save_file
from shard_chain import Chain, part, random_tokens, tables

from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.errors import BudgetError
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard_bytes import shard_bytes, table_bytes
from tightfit.workers.stage import Stage

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS = ["bloom", "opt", "opt-350m", "llama", "llama-mha-tied"]


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_table_on_the_host_gives_the_same_log_probabilities(tmp_path, variant, fmt, kind):
    path = tiny_models.build(variant, tmp_path / "model").path
    if kind == "bin":
        path = as_fp16_bin(path, tmp_path / "bin")
    slices = [part(0, tables()[0], 0, random_tokens(40, seed=1))]
    device, host = (
        Chain(path, 2, fmt, embedding_place=place).log_probs(slices) for place in ("device", "host")
    )
    torch.testing.assert_close(host, device, atol=0, rtol=0)


def as_fp16_bin(source, path):
    checkpoint = open_checkpoint(source)
    path.mkdir()
    (path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: checkpoint.read(name).half() for name in checkpoint.names()}
    torch.save(tensors, path / "pytorch_model.bin")
    return path


@pytest.mark.parametrize("fmt", ["bf16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_table_on_the_host_is_not_counted_where_it_is_not_held(
    tmp_path, variant, fmt, num_stages
):
    path = tiny_models.build(variant, tmp_path / "model").path
    (first, *_), (on_device, *_) = (
        Chain(path, num_stages, fmt, embedding_place=place).shards for place in ("host", "device")
    )
    config, formats = first.config, model_formats(first.config, fmt, embedding_place="host")
    assert first.formats == formats
    assert first.weight_bytes == shard_bytes(
        config, formats, 0, first.spec.end_layer, has_embedding=True, has_head=num_stages == 1
    )
    # One stage of a tied model in bf16 holds the table once for both ends: it still does.
    is_both = num_stages == 1 and config.tied_head and fmt == "bf16"
    saved = 0 if is_both else table_bytes(config, formats)
    assert on_device.weight_bytes - first.weight_bytes == saved


WIDTH, TOKENS = 1024, 32_768
MEASURE = """
import json, sys
from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.stage import Stage
import torch
torch.set_num_threads(1)
stage = Stage(StageSpec(**json.loads(sys.argv[1])))
ids = [7, 0, 32_767, 20_000, 7]
batch = MicroBatch(epoch=0, step=0, slices=[
    SequenceSlice(sequence_id=1, start_position=0, token_ids=ids, block_table=[0])])
with torch.inference_mode():
    rows = stage.model.forward(batch, None)
memory = stage.memory()
print(json.dumps({"rows": rows[:, :8].float().tolist(), "weights": memory.weight_bytes,
    "predicted": memory.predicted_weight_bytes, "anon": memory.rss_anon_bytes,
    "host": memory.host_bytes}))
"""


@pytest.fixture(scope="module")
def wide_embedding(tmp_path_factory):
    """A small llama whose embedding is 64 MB in bf16."""
    path = tmp_path_factory.mktemp("wide") / "model"
    path.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH,
        "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 1, "vocab_size": TOKENS, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    decoder = decoder_config(config)
    generator = torch.Generator().manual_seed(0)
    wanted = [*decoder.embedding_tensors(), *decoder.head_tensors()]
    for layer in range(decoder.num_layers):
        wanted += decoder.layer_tensors(layer)
    tensors = {
        f"model.{name}": torch.randn(shape, generator=generator).to(torch.bfloat16)
        for name, shape in dict(wanted).items()
    }
    save_file(tensors, path / "model.safetensors")
    return path


@pytest.mark.slow
def test_a_table_on_the_host_takes_no_memory_of_its_process(wide_embedding):
    measured = {}
    for place in ("device", "host"):
        spec = {
            "model_path": str(wide_embedding), "stage_index": 0, "num_stages": 2, "first_layer": 0,
            "end_layer": 1, "format": "bf16", "num_kv_blocks": 1, "max_batch_tokens": 32,
            "embedding_place": place,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, json.dumps(spec)],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        measured[place] = json.loads(done.stdout)
    device, host = measured["device"], measured["host"]
    table = TOKENS * WIDTH * 2
    assert host["rows"] == device["rows"]
    assert host["weights"] == host["predicted"] == device["weights"] - table
    assert device["anon"] - host["anon"] > 0.9 * table
    assert host["anon"] < table / 2
    assert host["host"] == device["host"] == 0


def smollm2(**changes):
    fields = {
        "model_path": str(gguf()), "stage_index": 0, "num_stages": 2, "first_layer": 0,
        "end_layer": 1, "format": "int8", "num_kv_blocks": 1, "max_batch_tokens": 16,
    }  # fmt: skip
    return Stage(StageSpec(**{**fields, **changes}))


def embedded(stage):
    part = SequenceSlice(sequence_id=0, start_position=0, token_ids=[5, 49_151], block_table=[0])
    batch = MicroBatch(epoch=0, step=0, slices=[part])
    with torch.inference_mode():
        return stage.model.forward(batch, None)


def test_a_table_that_its_file_has_quantised_is_widened_on_the_host_and_counted_there():
    host, device = smollm2(embedding_place="host"), smollm2()
    assert torch.equal(embedded(host), embedded(device))
    table = table_bytes(host.config, model_formats(host.config, "int8"))
    assert host.memory().host_bytes == table == 49_152 * 576 * 2
    assert device.memory().host_bytes == 0
    assert device.memory().weight_bytes - host.memory().weight_bytes == table
    assert host.memory().total_bytes == device.memory().total_bytes


@pytest.fixture
def memory_limit_restored():
    """A stage with a budget limits its process, which is the tests' here."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    yield
    resource.setrlimit(resource.RLIMIT_DATA, before)


@pytest.mark.usefixtures("memory_limit_restored")
def test_a_widened_table_counts_against_a_cpu_stage_s_budget():
    memory = smollm2(embedding_place="host").memory()
    fits = smollm2(embedding_place="host", memory_budget_bytes=memory.total_bytes)
    assert fits.num_kv_blocks == 1
    with pytest.raises(BudgetError, match="its budget is"):
        smollm2(embedding_place="host", memory_budget_bytes=memory.total_bytes - 1)

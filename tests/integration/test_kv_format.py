import json
import random

import pytest
import tiny_models
from served import Served, save_model

from tightfit.client import Client
from tightfit.cluster import cli

pytestmark = pytest.mark.slow

CHANCE_LIMIT = 0.06
"""Most that a token's log-probability may differ from that with fp32 keys and values, in nats;
0.033 is the most seen."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("llama", tmp_path_factory.mktemp("models") / "tiny")


def test_a_service_with_int8_keys_and_values_says_so_and_answers_as_the_model_does(model, capsys):
    generator = random.Random(0)
    text = [generator.randrange(tiny_models.VOCAB) for _ in range(120)]
    flags = ("--format", "fp32", "--kv-format", "int8", "--stages", "2", "--kv-blocks", "40")
    with Served(model.path, *flags) as served, Client(served.target, timeout_s=60) as client:
        scores = client.score(text)
        answers = [client.generate(text, max_tokens=40).token_ids for _ in range(2)]
        stages = client.status().stages
        assert cli.main(["status", "--target", served.target]) == 0
        table = capsys.readouterr().out
        assert cli.main(["status", "--json", "--target", served.target]) == 0
        answer = json.loads(capsys.readouterr().out)
    exact = model.log_probs(text)
    expected = [float(exact[i, token]) for i, token in enumerate(text[1:])]
    assert scores.logprobs == pytest.approx(expected, abs=CHANCE_LIMIT)
    assert scores.logprobs != pytest.approx(expected, abs=1e-6)
    assert answers[0] == answers[1]
    assert [stage.kv_format for stage in stages] == ["int8", "int8"]
    assert [stage["kv_format"] for stage in answer["stages"]] == ["int8", "int8"]
    assert "int8" in table
    config = model.hf.config
    heads = config.num_key_value_heads
    size = config.hidden_size // config.num_attention_heads
    blocks = 40 * 16 * 2 * heads * (size + 2)
    layers = [stage.end_layer - stage.first_layer for stage in stages]
    assert [stage.memory.kv_cache_bytes for stage in stages] == [n * blocks for n in layers]

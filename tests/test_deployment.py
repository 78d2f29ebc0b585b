"""From a configuration to the stages that it asks for."""

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tightfit.cluster.config import ServeConfig
from tightfit.cluster.deployment import Interrupts, stage_specs
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.launch import ModelDescription
from tightfit.workers.decoder_config import decoder_config

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 64,
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip


def _specs(**settings):
    model = ModelDescription(path=Path("m"), config=decoder_config(LLAMA), source_format="")
    return stage_specs(ServeConfig(model="m", **settings), model)


def test_every_stage_is_told_the_formats():
    specs = _specs(stages=2, format="int4", head_format="bf16", kv_format="int8")
    assert [(s.first_layer, s.end_layer) for s in specs] == [(0, 2), (2, 4)]
    assert {(s.format, s.head_format, s.kv_format) for s in specs} == {("int4", "bf16", "int8")}


def test_formats_that_do_not_go_together_are_refused():
    with pytest.raises(ConfigError, match=r"head_format: layers in fp32 .* choose fp32 for both"):
        _specs(format="fp32", head_format="int8")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_something_swallows_still_ends_the_start(number):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check()
        with suppress(BaseException):  # as a finaliser does, or a library
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(number) is before

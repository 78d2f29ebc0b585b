"""Cutting a text into samples for calibration."""

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from tightfit.cluster.calibration_text import CalibrationText, spread
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.tokenizer import Tokenizer


def _tokenizer(start=False):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = FastTokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(["<s>", *alphabet])}, merges=[])
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if start:
        fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return Tokenizer(fast)


def test_samples_are_the_text_in_order_without_what_is_left_over(tmp_path):
    file = tmp_path / "text"
    file.write_text("0123456789" * 10)
    tokenizer = _tokenizer()
    samples = CalibrationText.read(file, tokenizer).samples(32)
    assert [len(sample) for sample in samples] == [32, 32, 32]
    whole = tokenizer.encode("0123456789" * 10)
    assert [token for sample in samples for token in sample] == whole[:96]


def test_each_sample_begins_as_a_prompt_does(tmp_path):
    file = tmp_path / "text"
    file.write_text("abcdefghij" * 10)
    samples = CalibrationText.read(file, _tokenizer(start=True)).samples(26)
    assert len(samples) == 4
    assert all(sample[0] == 0 and 0 not in sample[1:] for sample in samples)
    assert {len(sample) for sample in samples} == {26}


def test_bytes_that_are_no_text_do_not_end_it(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"abc\xff\xfe" * 10)
    assert CalibrationText.read(file, _tokenizer()).samples(8)


def test_a_text_that_is_missing_or_too_short_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"quantize\.calibration: .*nothing cannot be read"):
        CalibrationText.read(tmp_path / "nothing", _tokenizer())
    (tmp_path / "short").write_text("abc")
    with pytest.raises(ConfigError, match="has 3 tokens, fewer than one sample of 8"):
        CalibrationText.read(tmp_path / "short", _tokenizer()).samples(8)


@pytest.mark.parametrize(("size", "count", "chosen"), [(10, 5, [0, 2, 4, 6, 8]), (3, 9, [0, 1, 2])])
def test_samples_are_taken_from_the_whole_text(size, count, chosen):
    pool = [[i] for i in range(size)]
    assert spread(pool, count) == [[i] for i in chosen]


def test_what_is_held_out_is_the_end_and_in_no_other_sample(tmp_path):
    file = tmp_path / "text"
    file.write_text("".join(chr(33 + i % 90) for i in range(100)))
    text = CalibrationText.read(file, _tokenizer(start=True))
    kept, held_out = text.hold_out(2, 17)
    assert [len(sample) for sample in held_out] == [17, 17]
    assert all(sample[0] == 0 for sample in held_out)
    assert (*kept.tokens, *held_out[0][1:], *held_out[1][1:]) == text.tokens
    with pytest.raises(ConfigError, match="100 tokens, of which 64 are more than half"):
        text.hold_out(4, 17)

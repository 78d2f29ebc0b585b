"""Cuts a text into the samples that a model is calibrated with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.tokenizer import Tokenizer


def text_samples(path: Path, tokenizer: Tokenizer, num_tokens: int) -> list[list[int]]:
    """All consecutive pieces of a text, each with what the model expects before one.

    Args:
        path: UTF-8 text; what is no UTF-8 in it is replaced.
        tokenizer: of the model.
        num_tokens: of each piece; what is left at the end is no piece.
    Raises:
        ConfigError: the file cannot be read, or is too short for one piece.
    """
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise ConfigError(f"quantize.calibration: {path} cannot be read: {error}") from error
    start = _start(tokenizer)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    step = num_tokens - len(start)
    samples = [
        [*start, *tokens[first : first + step]] for first in range(0, len(tokens) - step + 1, step)
    ]
    if not samples:
        raise ConfigError(
            f"quantize.calibration: {path} has {len(tokens)} tokens, fewer than one sample of "
            f"{num_tokens}; give a longer text, or a smaller quantize.sample_tokens"
        )
    return samples


def spread(pool: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` of the pool at equal distances, or all if there are fewer."""
    count = min(count, len(pool))
    return [pool[i * len(pool) // count] for i in range(count)]


def _start(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text."""
    mark = tokenizer.encode("a", add_special_tokens=False)
    marked = tokenizer.encode("a")
    for first in range(len(marked) - len(mark) + 1):
        if marked[first : first + len(mark)] == mark:
            return marked[:first]
    return []

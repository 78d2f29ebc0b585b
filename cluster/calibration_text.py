"""Cuts a text into the samples that a model is calibrated with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tightfit.cluster.errors import ConfigError
from tightfit.cluster.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationText:
    """The tokens of a text."""

    path: Path
    start: tuple[int, ...]
    """What the model expects before a text."""
    tokens: tuple[int, ...]

    @classmethod
    def read(cls, path: Path, tokenizer: Tokenizer) -> CalibrationText:
        """A file's, UTF-8; what is no UTF-8 in it is replaced.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise ConfigError(f"quantize.calibration: {path} cannot be read: {error}") from error
        tokens = tokenizer.encode(text, add_special_tokens=False)
        return cls(path=path, start=tuple(_start(tokenizer)), tokens=tuple(tokens))

    def samples(self, num_tokens: int) -> list[list[int]]:
        """All consecutive pieces, each with what the model expects before one.

        Args:
            num_tokens: of each piece; what is left at the end is no piece.
        Raises:
            ConfigError: the text is too short for one piece.
        """
        tokens, step = self.tokens, num_tokens - len(self.start)
        samples = [
            [*self.start, *tokens[first : first + step]]
            for first in range(0, len(tokens) - step + 1, step)
        ]
        if not samples:
            raise ConfigError(
                f"quantize.calibration: {self.path} has {len(tokens)} tokens, fewer than one "
                f"sample of {num_tokens}; give a longer text, or a smaller quantize.sample_tokens"
            )
        return samples

    def hold_out(
        self, num_samples: int, num_tokens: int
    ) -> tuple[CalibrationText, list[list[int]]]:
        """Cut pieces off the end: what is left, and the pieces.

        Args:
            num_samples: how many.
            num_tokens: of each, with what the model expects before one.
        Raises:
            ConfigError: they would be more than half of the text.
        """
        count = num_samples * (num_tokens - len(self.start))
        if 2 * count > len(self.tokens):
            raise ConfigError(
                f"quantize.calibration: {self.path} has {len(self.tokens)} tokens, of which "
                f"{count} are more than half; give a longer text, or a smaller "
                f"quantize.measure_tokens"
            )
        kept = dataclasses.replace(self, tokens=self.tokens[:-count])
        end = dataclasses.replace(self, tokens=self.tokens[-count:])
        return kept, end.samples(num_tokens)


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

"""From a sequence's tokens to its text: incremental, with stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from tightfit.cluster.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_WINDOW, MIN_WINDOW = 12, 4
"""Tokens decoded at once. A character has at most 4 bytes, and a token at least one: the last
4 tokens hold the last character whole."""
ASCII_END = 0x80


class IncrementalDecoder:
    """Text of a growing list of tokens, each character as soon as it is whole.

    What a token looks like depends on those before it (spaces, bytes of one character), so a window
    of the latest tokens is decoded each time, and what was shown of it before is cut off. The cost
    of a token does not grow with their number.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_shown = 0
        """Characters of the window's text that are out."""
        self._bytes: codecs.IncrementalDecoder | None = None
        """Set within a run of byte tokens that has gone beyond ASCII."""

    def push(self, token_id: int) -> str:
        """Add a token; the text that is now certain, which may be empty."""
        if self._tokenizer.is_silent(token_id):
            return ""
        value = self._tokenizer.byte_value(token_id)
        if value is not None and (value >= ASCII_END or self._bytes is not None):
            return self._push_byte(token_id, value)
        text = self._end_bytes()
        self._window.append(token_id)
        whole = self._tokenizer.decode(self._window)
        # An incomplete character shows as one replacement character at the end.
        certain = len(whole) - whole.endswith(REPLACEMENT)
        text += whole[self._num_shown : certain]
        self._num_shown = max(self._num_shown, certain)
        if len(self._window) >= MAX_WINDOW and self._num_shown:
            self._shorten(num_held=len(whole) - self._num_shown)
        return text

    def finish(self) -> str:
        """What is left at the end: an incomplete character, as a replacement character."""
        text = self._end_bytes()
        whole = self._tokenizer.decode(self._window)
        text += whole[self._num_shown :]
        self._num_shown = len(whole)
        return text

    def _shorten(self, *, num_held: int) -> None:
        """Keep the window's last tokens, of whose text `num_held` characters are not out."""
        shorter = self._window[-MIN_WINDOW:]
        length = len(self._tokenizer.decode(shorter))
        if length > num_held:  # else the next token would look like the first of a text
            self._window, self._num_shown = shorter, length - num_held

    def _push_byte(self, token_id: int, value: int) -> str:
        """A run of byte tokens is decoded here: the tokenizer, given part of a run, or one that is
        not UTF-8 throughout, turns all of it into replacement characters."""
        text = ""
        if self._bytes is None:
            text = self.finish()
            self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        # What comes after the run is decoded behind its last byte.
        self._window = [token_id]
        return text + self._bytes.decode(bytes([value]))

    def _end_bytes(self) -> str:
        if self._bytes is None:
            return ""
        text = self._bytes.decode(b"", final=True)
        self._bytes = None
        self._num_shown = len(self._tokenizer.decode(self._window))
        return text


def decode_whole(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Text of tokens, exactly as a stream of them would have shown it."""
    if not tokenizer.has_byte_tokens:
        return tokenizer.decode(token_ids)
    decoder = IncrementalDecoder(tokenizer)
    return "".join([decoder.push(token_id) for token_id in token_ids]) + decoder.finish()


class StopFinder:
    """Lets text through up to the first stop string, which may come in pieces.

    Text that could be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; what may be shown now. Sets `found` when a stop string is complete."""
        if not self._stops:
            return text
        if not text or self.found:
            return ""
        self._held += text
        starts = ((self._held.find(stop), len(stop)) for stop in self._stops)
        ends = [(start + length, start) for start, length in starts if start >= 0]
        if ends:
            self.found = True
            _, start = min(ends)  # the one that is complete first, however the text comes
            return self._release(start)
        return self._release(len(self._held) - self._possible_beginning())

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        return "" if self.found else self._release(len(self._held))


class TextStream:
    """The text of one sequence as its tokens come.

    Args:
        tokenizer: the model's.
        stops: stop strings.
        resumed: output tokens that the client already has. Their text is not shown again, but a
            character or a stop string may begin in it.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), resumed: Sequence[int] = ()
    ) -> None:
        self._decoder = IncrementalDecoder(tokenizer)
        self._stop = StopFinder(stops)
        for token in resumed:
            self._stop.push(self._decoder.push(token))

    @property
    def found_stop(self) -> bool:
        """A stop string is complete: the sequence is to be ended, and later tokens ignored."""
        return self._stop.found

    def push(self, token_id: int) -> str:
        """Add a token; the text that may be shown now."""
        return self._stop.push(self._decoder.push(token_id))

    def finish(self) -> str:
        """The rest, at the sequence's end."""
        if self._stop.found:
            return ""
        return self._stop.push(self._decoder.finish()) + self._stop.finish()

"""From a sequence's token events to text: incremental, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.cluster.tokenizer import IncrementalDecoder, Tokenizer


class StopFinder:
    """Lets text through up to the first stop string, which may come in pieces.

    Text that could be the beginning of a stop string is held back until it is known.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Add text; what may be shown now. Sets `found` when a stop string is complete."""
        if not self._stops:
            return text
        self._held += text
        hits = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if hits:
            self.found = True
            return self._release(min(hits))
        return self._release(len(self._held) - self._possible_beginning())

    def _release(self, length: int) -> str:
        shown, self._held = self._held[:length], self._held[length:]
        return shown

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
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
        resumed: output tokens that the client already has; their text is not shown again, but a
        stop
            string may begin in it.
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

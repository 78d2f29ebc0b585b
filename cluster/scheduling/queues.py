"""Who waits, and until when: heaps from which entries can be taken back.

An entry that was taken back stays in its heap until it comes to the top or until such entries
outnumber the live ones: a client that sends and cancels for hours holds no memory.
"""

from __future__ import annotations

import heapq

from tightfit.cluster.scheduling.sequence import Rank, Sequence

MIN_COMPACTION = 64
"""Heaps smaller than this are left alone."""


class WaitingQueue:
    """Sequences that own no blocks, the next to run first.

    Those that never ran are counted apart, with their tokens: admission limits them.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Rank, int, Sequence]] = []
        self._live: set[int] = set()
        self.num_tokens = 0
        """Known tokens of all that wait."""
        self.num_new = 0
        """Sequences that never ran."""
        self.num_new_tokens = 0
        """Their tokens."""

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.sequence_id in self._live

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait in its place."""
        self._live.add(sequence.sequence_id)
        self.num_tokens += len(sequence.tokens)
        heapq.heappush(self._heap, (sequence.rank, sequence.sequence_id, sequence))
        if not sequence.was_admitted:
            self.num_new += 1
            self.num_new_tokens += len(sequence.tokens)

    def first(self) -> Sequence | None:
        """The next to run."""
        while self._heap and self._heap[0][1] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][2] if self._heap else None

    def discard(self, sequence: Sequence) -> bool:
        """Take a sequence out; False: it was not waiting."""
        if sequence.sequence_id not in self._live:
            return False
        self._live.remove(sequence.sequence_id)
        self.num_tokens -= len(sequence.tokens)
        if not sequence.was_admitted:
            self.num_new -= 1
            self.num_new_tokens -= len(sequence.tokens)
        if len(self._heap) > MIN_COMPACTION + 2 * len(self._live):
            self._heap = [entry for entry in self._heap if entry[1] in self._live]
            heapq.heapify(self._heap)
        return True

    def check_integrity(self, waiting: list[Sequence]) -> None:
        """Assert that exactly these wait, and that the counts are theirs."""
        assert {s.sequence_id for s in waiting} == self._live
        assert self._live <= {entry[1] for entry in self._heap}, "a waiting sequence is lost"
        assert sum(len(s.tokens) for s in waiting) == self.num_tokens
        new = [s for s in waiting if not s.was_admitted]
        assert (len(new), sum(len(s.tokens) for s in new)) == (self.num_new, self.num_new_tokens)


class Deadlines:
    """When requests are to end."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []
        self._live: dict[str, int] = {}
        self._entries = 0

    def __len__(self) -> int:
        return len(self._live)

    def add(self, request_id: str, deadline_s: float) -> None:
        """Note a deadline; the request has none yet."""
        # Numbered, so that a request's entry cannot end a later one with the same id.
        self._entries += 1
        self._live[request_id] = self._entries
        heapq.heappush(self._heap, (deadline_s, self._entries, request_id))

    def discard(self, request_id: str) -> None:
        """The request has ended; unknown ids do nothing."""
        self._live.pop(request_id, None)
        if len(self._heap) > MIN_COMPACTION + 2 * len(self._live):
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def pop_due(self, now_s: float) -> list[str]:
        """Requests whose deadline is at or before `now_s`, earliest first."""
        due = []
        while self._heap and self._heap[0][0] <= now_s:
            _, entry, request_id = heapq.heappop(self._heap)
            if self._live.get(request_id) == entry:
                del self._live[request_id]
                due.append(request_id)
        return due

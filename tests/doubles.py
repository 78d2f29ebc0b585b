"""Doubles for tests: stages that model a KV cache exactly, and compute nothing."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Sequence

from tightfit.workers.api import (
    MicroBatch,
    SampledToken,
    SequenceScores,
    SequenceSlice,
    StepResult,
)


def next_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that the modelled language model continues `context` with."""
    digest = hashlib.sha256(repr(list(context)).encode()).digest()
    return int.from_bytes(digest[:4], "big") % vocab_size


def expected_output(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What an unscheduled, undisturbed sequence generates."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


class ModelStages:
    """Stages as a FIFO with a paged KV store of (position, token) in every slot.

    Every slice reads its whole context back out of the store: a block that was lost, shared
    wrongly or written by another shows at once, and the next token depends on the whole context.
    """

    def __init__(self, *, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)
        self._block_size, self._vocab_size = block_size, vocab_size
        self.num_slices = 0

    def compute(self, slices: Sequence[SequenceSlice], *, epoch: int, step: int) -> StepResult:
        """What the last stage would return."""
        tokens, scores = [], []
        for part in slices:
            self.num_slices += 1
            context = self._write_and_read(part)
            if part.sampling is not None:
                tokens.append(
                    SampledToken(
                        sequence_id=part.sequence_id, token_id=next_token(context, self._vocab_size)
                    )
                )
            if part.score_targets:
                scores.append(
                    SequenceScores(
                        sequence_id=part.sequence_id,
                        start_position=part.start_position,
                        logprobs=[-float(target) for target in part.score_targets],
                    )
                )
        return StepResult(epoch=epoch, step=step, tokens=tokens, scores=scores, forward_s=[0.0])

    def _write_and_read(self, part: SequenceSlice) -> list[int]:
        end = part.start_position + len(part.token_ids)
        size, table = self._block_size, part.block_table
        assert len(table) * size >= end, "the block table does not cover the slice"
        for offset, token in enumerate(part.token_ids):
            position = part.start_position + offset
            self._slots[table[position // size] * size + position % size] = (position, token)
        context = []
        for position in range(end):
            held = self._slots[table[position // size] * size + position % size]
            assert held is not None, f"position {position} was never written"
            assert held[0] == position, f"position {position} holds another's {held}"
            context.append(held[1])
        return context


class FakeChain:
    """A `StageChain` of `ModelStages`, answering in order; may be paused, failed or made slow."""

    def __init__(self, stages: ModelStages, *, delay_s: float = 0.0) -> None:
        self._stages, self._delay_s = stages, delay_s
        self._results: deque[StepResult] = deque()
        self._ready = threading.Condition()
        self._woken = False
        self.paused = False
        self.fail_with: str | None = None

    def send(self, batch: MicroBatch) -> None:
        with self._ready:
            if self.fail_with is not None:
                result = StepResult(epoch=batch.epoch, step=batch.step, error=self.fail_with)
            else:
                result = self._stages.compute(batch.slices, epoch=batch.epoch, step=batch.step)
            self._results.append(result)
            self._ready.notify()

    def receive(self, timeout_s: float | None) -> StepResult | None:
        with self._ready:
            self._ready.wait_for(
                lambda: self._woken or (self._results and not self.paused), timeout_s
            )
            self._woken = False
            if self.paused or not self._results:
                return None
            if self._delay_s:
                threading.Event().wait(self._delay_s)
            return self._results.popleft()

    def resume(self) -> None:
        with self._ready:
            self.paused = False
            self._ready.notify()

    def wake(self) -> None:
        with self._ready:
            self._woken = True
            self._ready.notify()

    def close(self) -> None:
        pass

"""Doubles for tests: stages that model a KV cache exactly, and compute nothing; a scheduler run on
them."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tightfit.cluster.request import Request, SamplingParams, TokenEvent
from tightfit.cluster.scheduling.batching import Scheduler, SchedulerConfig
from tightfit.workers.api import (
    MicroBatch,
    SampledToken,
    SamplingSpec,
    SequenceScores,
    SequenceSlice,
    StepResult,
)


def extend(digest: bytes, token: int) -> bytes:
    """Identity of a context with one more token."""
    return hashlib.blake2b(digest + token.to_bytes(4, "big"), digest_size=16).digest()


def next_token(context: Sequence[int], vocab_size: int) -> int:
    """The token that the modelled language model continues `context` with."""
    digest = b""
    for token in context:
        digest = extend(digest, token)
    return _drawn(digest, vocab_size)


def _drawn(digest: bytes, vocab_size: int) -> int:
    return int.from_bytes(digest[:4], "big") % vocab_size


def expected_output(prompt: Sequence[int], count: int, vocab_size: int) -> list[int]:
    """What an unscheduled, undisturbed sequence generates."""
    digest, output = b"", []
    for token in prompt:
        digest = extend(digest, token)
    for _ in range(count):
        output.append(_drawn(digest, vocab_size))
        digest = extend(digest, output[-1])
    return output


class ModelStages:
    """Stages as a FIFO with a paged KV store.

    As in a real cache, what a slot holds depends on its token and on all tokens before it: here
    (position, token, digest of the context up to there). Every slice reads its whole context back:
    a block that was lost, written by another, or shared under another beginning shows at once,
    and the next token depends on the whole context.
    """

    def __init__(self, *, num_blocks: int, block_size: int, vocab_size: int) -> None:
        self._slots: list[tuple[int, int, bytes] | None] = [None] * (num_blocks * block_size)
        self._block_size, self._vocab_size = block_size, vocab_size
        self.num_slices = 0
        self.num_tokens = 0
        """Computed, in all."""

    def compute(self, slices: Sequence[SequenceSlice], *, epoch: int, step: int) -> StepResult:
        """What the last stage would return. As on a device, all of a micro-batch is written before
        any of it is read."""
        self.num_slices += len(slices)
        self.num_tokens += sum(len(part.token_ids) for part in slices)
        written = [slot for part in slices for slot in self._write(part)]
        assert len(set(written)) == len(written), "a slot is written twice in one micro-batch"
        tokens, scores = [], []
        for part in slices:
            digest = self._read(part)
            if part.sampling is not None:
                tokens.append(self.sampled(part.sequence_id, digest, part.sampling))
            if part.score_targets:
                scores.append(
                    SequenceScores(
                        sequence_id=part.sequence_id,
                        start_position=part.start_position,
                        logprobs=[-float(target) for target in part.score_targets],
                    )
                )
        return StepResult(
            epoch=epoch, step=step, tokens=tokens, scores=scores, forward_s=[0.0],
            started_unix_s=[time.time()],
        )  # fmt: skip

    def sampled(self, sequence_id: int, digest: bytes, spec: SamplingSpec) -> SampledToken:
        """The token after the context with this digest, whatever the spec wants."""
        return SampledToken(sequence_id=sequence_id, token_id=_drawn(digest, self._vocab_size))

    def _slot(self, part: SequenceSlice, position: int) -> int:
        size = self._block_size
        return part.block_table[position // size] * size + position % size

    def _write(self, part: SequenceSlice) -> list[int]:
        """Slots that the slice's tokens were written to."""
        start, end = part.start_position, part.start_position + len(part.token_ids)
        assert len(part.block_table) * self._block_size >= end, "blocks do not cover the slice"
        assert len(set(part.block_table)) == len(part.block_table), "a block twice in one table"
        before = self._slots[self._slot(part, start - 1)] if start else (0, 0, b"")
        assert before is not None, f"position {start - 1} was never written"
        digest, slots = before[2], []
        for position, token in enumerate(part.token_ids, start):
            digest = extend(digest, token)
            slots.append(self._slot(part, position))
            self._slots[slots[-1]] = (position, token, digest)
        return slots

    def _read(self, part: SequenceSlice) -> bytes:
        """Digest of the slice's context, every slot of it checked."""
        digest = b""
        for position in range(part.start_position + len(part.token_ids)):
            held = self._slots[self._slot(part, position)]
            assert held is not None, f"position {position} was never written"
            assert held[0] == position, f"position {position} holds another's {held}"
            digest = extend(digest, held[1])
            assert held[2] == digest, f"position {position} was written under another beginning"
        return digest


class Simulation:
    """A scheduler with modelled stages behind it and `depth` micro-batches in flight."""

    VOCAB = 1000

    def __init__(self, *, depth: int = 1, **changes: Any) -> None:
        sizes = {
            "num_blocks": 64, "block_size": 4, "max_batch_tokens": 32, "max_batch_sequences": 8,
            "max_running_sequences": 16, "max_context_tokens": 200, "num_stages": depth,
        }  # fmt: skip
        self.config = SchedulerConfig(**{**sizes, **changes})
        self.scheduler = Scheduler(self.config)
        self.depth = depth
        self.now_s = 0.0
        self.steps = 0
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], TokenEvent] = {}
        self.events: list[TokenEvent] = []
        self.token_steps: dict[tuple[str, int], list[int]] = {}
        """Number of micro-batches applied when each token came."""
        self._resumed: dict[str, int] = {}
        self._applied = 0
        self._start_stages()

    def _start_stages(self) -> None:
        config = self.config
        self.stages = ModelStages(
            num_blocks=config.num_blocks, block_size=config.block_size, vocab_size=self.VOCAB
        )
        self.in_flight: deque[tuple[tuple[SequenceSlice, ...], StepResult]] = deque()

    def add(self, request: Request) -> None:
        """Queue a request."""
        events = self.scheduler.add(request, self.now_s)
        self._resumed[request.request_id] = len(request.resume_token_ids)
        for index in range(request.sampling.n):
            self.outputs[(request.request_id, index)] = []
        self.note(events)

    def note(self, events: Sequence[TokenEvent]) -> None:
        """Check events against each other: offsets without gaps, one end, nothing after it."""
        for event in events:
            self.events.append(event)
            key = (event.request_id, event.index)
            assert key not in self.ends, f"{key} spoke after its end"
            output = self.outputs[key]
            if event.token_id is not None:
                assert event.token_offset == self._resumed[event.request_id] + len(output)
                output.append(event.token_id)
                self.token_steps.setdefault(key, []).append(self._applied)
            if event.finish_reason is not None:
                self.ends[key] = event

    def send(self) -> bool:
        """Fill the pipeline by one micro-batch, if there is room and work."""
        if len(self.in_flight) == self.depth:
            return False
        slices = self.scheduler.next_micro_batch(self.now_s)
        if slices is None:
            assert self.in_flight or not self.scheduler.has_work, "the pipeline is idle beside work"
            return False
        assert all(part.token_ids for part in slices)
        assert sum(len(part.token_ids) for part in slices) <= self.config.max_batch_tokens
        assert len(slices) <= self.config.max_batch_sequences
        assert len({part.sequence_id for part in slices}) == len(slices)
        self.in_flight.append((slices, self.stages.compute(slices, epoch=1, step=self.steps)))
        self.steps += 1
        return True

    def receive(self) -> None:
        """Apply the oldest result, if there is one."""
        if self.in_flight:
            slices, result = self.in_flight.popleft()
            self._applied += 1
            self.note(self.scheduler.apply(slices, result, self.now_s))

    def lose_the_stages(self, num_blocks: int | None = None) -> None:
        """All KV and all that is in flight is gone; fresh stages take over, with so many blocks."""
        self.note(self.scheduler.reset_in_flight(num_blocks))
        self.config = self.scheduler.config
        self._start_stages()

    def step(self) -> bool:
        """Fill the pipeline and take one result; False: nothing was in flight."""
        while self.send():
            pass
        if not self.in_flight:
            return False
        self.receive()
        return True

    def run(self, limit: int = 20_000) -> None:
        """To the end of all requests."""
        for _ in range(limit):
            if not self.step():
                break
        assert not self.scheduler.has_work, "work is left that nothing runs"
        assert self.scheduler.next_micro_batch(self.now_s) is None
        self.scheduler.check_integrity()
        assert self.scheduler.counts().num_blocks_used == 0


def request(
    request_id: str,
    prompt: Sequence[int],
    *,
    max_tokens: int = 8,
    resume: Sequence[int] = (),
    **more: Any,
) -> Request:
    """A request; keywords of SamplingParams and of Request alike."""
    sampling = {k: more.pop(k) for k in list(more) if k in SamplingParams.__dataclass_fields__}
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        resume_token_ids=tuple(resume),
        **more,
    )


class FakeChain:
    """A `StageChain` of `ModelStages`, answering in order; may be paused, failed or made slow."""

    def __init__(self, stages: ModelStages, *, delay_s: float = 0.0) -> None:
        self._stages: ModelStages | None = stages
        self._delay_s = delay_s
        self._results: deque[StepResult] = deque()
        self._ready = threading.Condition()
        self._woken = False
        self.paused = False
        self.fail_with: str | None = None
        self.deadly_token: int | None = None

    def replace(self, stages: ModelStages | None) -> None:
        """Other stages from now on; None: there are none, and what is sent is lost."""
        with self._ready:
            self._stages, self.fail_with = stages, None
            self._results.clear()

    def send(self, batch: MicroBatch) -> None:
        with self._ready:
            if any(self.deadly_token in part.token_ids for part in batch.slices):
                self.fail_with = "stage 1: a deadly token"
            if self._stages is None:
                return
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
            result = self._results.popleft()
        if self._delay_s:
            time.sleep(self._delay_s)  # without the lock: `wake` is called in an event loop
        return result

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

"""What runs next: continuous batching, chunked prefill, preemption by recompute.

A plain synchronous class: no clock, no sockets, no torch. The stages are a FIFO, and everything
here rests on that: a block may change hands while steps that use it are under way, because the new
owner's steps reach every stage after them.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from tightfit.cluster.request import FinishReason, Request, TokenEvent
from tightfit.cluster.scheduling.admission import Limits, check_admission
from tightfit.cluster.scheduling.kv_blocks import KVBlocks
from tightfit.cluster.scheduling.sequence import Sequence
from tightfit.workers.api import SampledToken, SequenceSlice, StepResult

MIN_SHARED_TOKENS = 64
"""Fewer tokens are not divided among stages: a step costs about as much for 1 token as for 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Sizes and limits."""

    num_blocks: int
    """KV blocks on the stage that has fewest."""
    block_size: int = 16
    """Tokens in a block."""
    max_batch_tokens: int = 512
    """Most tokens in a micro-batch."""
    max_batch_sequences: int = 64
    """Most sequences in a micro-batch."""
    max_running_sequences: int = 256
    """Most sequences that own blocks."""
    max_queued_requests: int = 1024
    """Sequences that may wait for their first step."""
    max_queued_tokens: int = 1_000_000
    """Their prompt tokens together."""
    max_context_tokens: int
    """The model's limit on prompt and output together."""
    num_stages: int = 1
    """Stages to keep busy."""
    eos_token_ids: frozenset[int] = frozenset()
    enable_prefix_cache: bool = True

    @property
    def max_context(self) -> int:
        """Most tokens of one sequence: the model's limit, or what the whole KV cache holds."""
        return min(self.max_context_tokens, self.num_blocks * self.block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerCounts:
    """A snapshot."""

    num_running: int
    """Sequences that own blocks."""
    num_waiting: int
    """Sequences that do not."""
    num_queued_tokens: int
    """Prompt tokens of sequences that never ran."""
    num_blocks: int
    num_blocks_used: int
    """Owned blocks."""
    num_blocks_cached: int
    """Nobody's, kept for a prompt that begins alike."""
    num_preemptions: int
    """Since the start."""
    num_prompt_tokens: int
    """Computed or taken from the cache, since the start."""
    num_generated_tokens: int
    """Since the start."""
    num_cached_tokens: int
    """Prompt tokens taken from the prefix cache, since the start."""


class Scheduler:
    """Owns every sequence's state and the KV blocks.

    Order of service is (priority, arrival). Decodes go first, then prefill chunks under the token
    budget. With several stages a micro-batch takes at most its share of the running sequences, so
    that there is one for each stage to work on; nobody waits for it, for a stage that has nothing
    else to do.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._blocks = KVBlocks(config.num_blocks)
        self._by_id: dict[int, Sequence] = {}
        self._requests: dict[str, list[Sequence]] = {}
        self._running: dict[int, Sequence] = {}
        self._waiting: list[tuple[tuple[int, int, int], Sequence]] = []
        self._deadlines: list[tuple[float, str]] = []
        self._next_id = 0
        self._arrivals = 0
        self._num_waiting = 0
        self._queued_requests = 0
        self._queued_tokens = 0
        self._preemptions = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0
        self._queue_times: list[float] = []

    # -- entering and leaving ----------------------------------------------------------------

    def add(self, request: Request, now_s: float) -> list[TokenEvent]:
        """Queue a request; returns events when it ends at once (all its tokens are already there).

        Raises:
            InvalidRequestError: it can never run here.
            OverloadedError: a queue is full.
        """
        config = self.config
        check_admission(
            request,
            Limits(
                max_context=config.max_context,
                max_queued_requests=config.max_queued_requests,
                max_queued_tokens=config.max_queued_tokens,
            ),
            queued_requests=self._queued_requests,
            queued_tokens=self._queued_tokens,
            is_known=request.request_id in self._requests,
            now_s=now_s,
        )
        self._arrivals += 1
        sequences = [
            Sequence(
                request,
                index,
                sequence_id=self._new_id(),
                arrival=self._arrivals,
                max_context=config.max_context,
                eos_token_ids=config.eos_token_ids,
                added_s=now_s,
            )
            for index in range(request.sampling.n)
        ]
        self._requests[request.request_id] = sequences
        if request.deadline_s is not None:
            heapq.heappush(self._deadlines, (request.deadline_s, request.request_id))
        events = []
        for sequence in list(sequences):
            self._by_id[sequence.sequence_id] = sequence
            self._queued_requests += 1
            self._queued_tokens += len(sequence.tokens)
            self._wait(sequence)
            reason = sequence.finish_reason() if request.resume_token_ids else None
            if reason is not None:
                events.append(self._end(sequence, reason))
        return events

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _wait(self, sequence: Sequence) -> None:
        self._num_waiting += 1
        heapq.heappush(self._waiting, (sequence.rank, sequence))

    def has_request(self, request_id: str) -> bool:
        """The request has a sequence that has not ended."""
        return request_id in self._requests

    @property
    def has_work(self) -> bool:
        """Some sequence has not ended."""
        return bool(self._by_id)

    def cancel(self, request_id: str, reason: FinishReason, error: str = "") -> list[TokenEvent]:
        """End every sequence of a request; its blocks are free at once. Unknown ids do nothing."""
        return [
            self._end(sequence, reason, error=error)
            for sequence in list(self._requests.get(request_id, ()))
        ]

    def finish(self, request_id: str, index: int, reason: FinishReason) -> list[TokenEvent]:
        """End one of a request's sequences. Unknown ones do nothing."""
        return [
            self._end(sequence, reason)
            for sequence in list(self._requests.get(request_id, ()))
            if sequence.index == index
        ]

    def expire(self, now_s: float) -> list[TokenEvent]:
        """End what has passed its deadline."""
        events: list[TokenEvent] = []
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, request_id = heapq.heappop(self._deadlines)
            events += self.cancel(request_id, FinishReason.DEADLINE)
        return events

    def fail_all(self, error: str) -> list[TokenEvent]:
        """End everything with an error."""
        return [
            event
            for request_id in list(self._requests)
            for event in self.cancel(request_id, FinishReason.ERROR, error)
        ]

    def _end(
        self,
        sequence: Sequence,
        reason: FinishReason,
        *,
        token: SampledToken | None = None,
        error: str = "",
    ) -> TokenEvent:
        """Forget a sequence; its last event."""
        self._leave_queue(sequence)
        if self._running.pop(sequence.sequence_id, None) is None:
            self._num_waiting -= 1
        self._blocks.release(sequence.block_table)
        sequence.block_table = []
        del self._by_id[sequence.sequence_id]
        siblings = self._requests[sequence.request.request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[sequence.request.request_id]
        return self._event(sequence, token, reason, error)

    def _leave_queue(self, sequence: Sequence) -> None:
        """Count a sequence out of the queue limits, once."""
        if not sequence.was_admitted:
            sequence.was_admitted = True
            self._queued_requests -= 1
            self._queued_tokens -= len(sequence.tokens)

    def _event(
        self,
        sequence: Sequence,
        token: SampledToken | None,
        reason: FinishReason | None,
        error: str = "",
    ) -> TokenEvent:
        return TokenEvent(
            request_id=sequence.request.request_id,
            index=sequence.index,
            token_offset=sequence.num_output - (token is not None),
            token_id=token.token_id if token else None,
            logprob=token.logprob if token else None,
            top_logprobs=tuple((i, p) for i, p in token.top_logprobs) if token else (),
            finish_reason=reason,
            scores=tuple(sequence.scores) if reason and sequence.request.score_only else (),
            num_cached_tokens=sequence.num_cached,
            error=error,
        )

    # -- what runs next ----------------------------------------------------------------------

    def next_micro_batch(self, now_s: float) -> tuple[SequenceSlice, ...] | None:
        """Reserve and return the next micro-batch; None when nothing can run now."""
        config = self.config
        budget = self._token_budget()
        room = config.max_batch_sequences
        share = -(-len(self._running) // config.num_stages)
        slices: list[SequenceSlice] = []
        prefills: list[Sequence] = []
        for sequence in sorted(self._running.values(), key=lambda s: s.rank):
            if sequence.sequence_id not in self._running or sequence.num_pending == 0:
                continue  # preempted for one before it, or waiting for a result
            if sequence.num_pending > 1:
                prefills.append(sequence)
            elif len(slices) < min(room, share) and budget and self._grow(sequence):
                slices.append(self._slice(sequence, 1))
                budget -= 1
        for sequence in prefills:
            if not budget or len(slices) == room:
                break
            if sequence.sequence_id in self._running:
                slices.append(self._slice(sequence, min(budget, sequence.num_pending)))
                budget -= len(slices[-1].token_ids)
        while budget and len(slices) < room:
            admitted = self._admit_next(now_s)
            if admitted is None:
                break
            slices.append(self._slice(admitted, min(budget, admitted.num_pending)))
            budget -= len(slices[-1].token_ids)
        # Someone may have been preempted after being put in.
        slices = [part for part in slices if part.sequence_id in self._running]
        return tuple(slices) or None

    def _token_budget(self) -> int:
        """Tokens of the next micro-batch: with several stages, each one's share of what there is
        to compute, so that a lone burst of prompts keeps all of them busy."""
        config = self.config
        if config.num_stages == 1:
            return config.max_batch_tokens
        known = sum(s.num_pending for s in self._running.values()) + self._queued_tokens
        share = max(MIN_SHARED_TOKENS, -(-known // config.num_stages))
        return min(config.max_batch_tokens, share)

    def _slice(self, sequence: Sequence, count: int) -> SequenceSlice:
        """The next `count` tokens of a sequence, marked as sent."""
        start = sequence.num_scheduled
        end = start + count
        sequence.num_scheduled = end
        is_last = end == len(sequence.tokens)
        score = sequence.request.score_only
        return SequenceSlice(
            sequence_id=sequence.sequence_id,
            start_position=start,
            token_ids=sequence.tokens[start:end],
            block_table=sequence.block_table[: -(-end // self.config.block_size)],
            sampling=sequence.sampling_spec() if is_last and not score else None,
            score_targets=sequence.tokens[start + 1 : end + 1] if score else [],
        )

    def _grow(self, sequence: Sequence) -> bool:
        """Own a block for the next token, taking others' if there is none; False: it had to step
        back."""
        if sequence.num_scheduled < len(sequence.block_table) * self.config.block_size:
            return True
        while self._blocks.num_available == 0:
            victim = max(self._running.values(), key=lambda s: s.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._blocks.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it will be computed again, with the same tokens."""
        self._preemptions += 1
        del self._running[sequence.sequence_id]
        del self._by_id[sequence.sequence_id]
        self._blocks.release(sequence.block_table)
        sequence.restart(self._new_id())
        self._by_id[sequence.sequence_id] = sequence
        self._wait(sequence)

    def _admit_next(self, now_s: float) -> Sequence | None:
        """Start the first waiting sequence if there is room for all its known tokens."""
        while self._waiting and not self._is_waiting(self._waiting[0][1]):
            heapq.heappop(self._waiting)  # ended meanwhile
        if not self._waiting or len(self._running) >= self.config.max_running_sequences:
            return None
        sequence = self._waiting[0][1]
        cached = self._cached_beginning(sequence)
        size = self.config.block_size
        needed = -(-len(sequence.tokens) // size) - len(cached)
        available = self._blocks.num_available - self._blocks.num_cached_among(cached)
        # Each running sequence may want a block soon: without this reserve the newcomer would be
        # preempted in its turn.
        if available < needed + len(self._running):
            return None
        heapq.heappop(self._waiting)
        self._num_waiting -= 1
        self._blocks.take(cached)
        sequence.block_table = [*cached, *self._blocks.allocate(needed)]
        sequence.num_scheduled = sequence.num_applied = len(cached) * size
        sequence.num_registered = len(cached)
        if not sequence.was_admitted:
            sequence.num_cached = min(sequence.num_scheduled, sequence.num_prompt)
            self._cached_tokens += sequence.num_cached
            self._prompt_tokens += sequence.num_prompt
            self._queue_times.append(now_s - sequence.added_s)
        self._leave_queue(sequence)
        self._running[sequence.sequence_id] = sequence
        return sequence

    def _is_waiting(self, sequence: Sequence) -> bool:
        return (
            self._by_id.get(sequence.sequence_id) is sequence
            and sequence.sequence_id not in self._running
        )

    def _cached_beginning(self, sequence: Sequence) -> list[int]:
        """Blocks that already hold the sequence's first tokens; never its last one."""
        if not self.config.enable_prefix_cache or sequence.request.score_only:
            return []
        size = self.config.block_size
        return self._blocks.match(sequence.digests((len(sequence.tokens) - 1) // size, size))

    # -- results -----------------------------------------------------------------------------

    def apply(
        self, slices: Iterable[SequenceSlice], result: StepResult, now_s: float
    ) -> list[TokenEvent]:
        """Take in what came back for a micro-batch. Results for sequences that ended are
        dropped."""
        tokens = {token.sequence_id: token for token in result.tokens}
        scores = {score.sequence_id: score for score in result.scores}
        events = []
        for part in slices:
            sequence = self._running.get(part.sequence_id)
            if sequence is None:
                continue
            sequence.num_applied += len(part.token_ids)
            self._register(sequence)
            if part.score_targets:
                sequence.scores += scores[part.sequence_id].logprobs
            if part.sampling is not None:
                events.append(self._append(sequence, tokens[part.sequence_id]))
            elif sequence.request.score_only and sequence.num_applied == len(sequence.tokens):
                events.append(self._end(sequence, FinishReason.LENGTH))
        return events

    def _append(self, sequence: Sequence, token: SampledToken) -> TokenEvent:
        sequence.tokens.append(token.token_id)
        self._generated_tokens += 1
        reason = sequence.finish_reason()
        if reason is not None:
            return self._end(sequence, reason, token=token)
        return self._event(sequence, token, None)

    def _register(self, sequence: Sequence) -> None:
        """Offer blocks that are now full on every stage to the prefix cache."""
        full = sequence.num_applied // self.config.block_size
        if not self.config.enable_prefix_cache or full == sequence.num_registered:
            return
        digests = sequence.digests(full, self.config.block_size)
        for i in range(sequence.num_registered, full):
            self._blocks.register(sequence.block_table[i], digests[i])
        sequence.num_registered = full

    def reset_in_flight(self) -> None:
        """The stages' caches are lost: every running sequence is computed again from its tokens."""
        for sequence in list(self._running.values()):
            self._preempt(sequence)
        self._blocks.forget_contents()

    # -- watching ----------------------------------------------------------------------------

    def counts(self) -> SchedulerCounts:
        """A snapshot."""
        blocks = self._blocks
        return SchedulerCounts(
            num_running=len(self._running),
            num_waiting=self._num_waiting,
            num_queued_tokens=self._queued_tokens,
            num_blocks=blocks.num_blocks,
            num_blocks_used=blocks.num_blocks - blocks.num_available,
            num_blocks_cached=blocks.num_cached,
            num_preemptions=self._preemptions,
            num_prompt_tokens=self._prompt_tokens,
            num_generated_tokens=self._generated_tokens,
            num_cached_tokens=self._cached_tokens,
        )

    def take_queue_times(self) -> list[float]:
        """Seconds that sequences admitted since the last call had waited."""
        times, self._queue_times = self._queue_times, []
        return times

    def check_integrity(self) -> None:
        """Assert every invariant; for tests and for idle times."""
        sequences: SequenceOf[Sequence] = list(self._by_id.values())
        self._blocks.check_integrity([s.block_table for s in sequences])
        waiting = [s for s in sequences if s.sequence_id not in self._running]
        assert len(waiting) == self._num_waiting
        assert all(not s.block_table for s in waiting), "a waiting sequence owns blocks"
        queued = [s for s in sequences if not s.was_admitted]
        assert len(queued) == self._queued_requests
        assert sum(len(s.tokens) for s in queued) == self._queued_tokens
        for sequence in sequences:
            assert sequence.num_applied <= sequence.num_scheduled <= len(sequence.tokens)

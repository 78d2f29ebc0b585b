"""What runs next: continuous batching, chunked prefill, preemption by recompute.

A plain synchronous class: no clock, no sockets, no torch. The stages are a FIFO, and everything
here rests on that: a block may change hands while steps that use it are under way, because the new
owner's steps reach every stage after them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import replace
from operator import attrgetter

from tightfit.cluster.errors import InvalidRequestError
from tightfit.cluster.request import FinishReason, Request, TokenEvent
from tightfit.cluster.scheduling.admission import AdmissionRate, check_request, check_room
from tightfit.cluster.scheduling.config import SchedulerConfig, SchedulerCounts
from tightfit.cluster.scheduling.kv_blocks import KVBlocks
from tightfit.cluster.scheduling.queues import Deadlines, WaitingQueue
from tightfit.cluster.scheduling.sequence import Sequence
from tightfit.workers.api import SampledToken, SequenceSlice, StepResult

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerCounts"]

MIN_SHARED_TOKENS = 64
"""Fewer tokens are not divided among stages: a step costs about as much for 1 token as for 16."""
MAX_LOSSES = 3
"""A request that was under way so often when the pipeline was lost, without coming further, is not
tried again: it may be what stages die of."""

by_rank = attrgetter("rank")
by_turn = attrgetter("last_turn")


def by_priority(sequence: Sequence) -> int:
    """Sorts the highest first."""
    return sequence.rank[0]


class Scheduler:
    """Owns every sequence's state and the KV blocks.

    Order of service is (priority, arrival). Decodes go first, then prefill chunks under the token
    budget; when not all decodes fit, those that waited longest go.

    With several stages a micro-batch takes at most ceil(running / stages) decodes. Without that
    limit a burst of requests, prefilled together, would decode in one micro-batch for good, and one
    stage at a time would work. The limit is never worse: where a stage's time does not depend on
    the number of tokens (decoding is bound by reading weights), p cohorts of B / p sequences give
    the same tokens per second as one of B that passes p stages; where it does, or where prefill
    mixes in, they give up to p times as many. It needs no lower bound, for a stage that is not
    given its own micro-batch has nothing else to do.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._blocks = KVBlocks(config.num_blocks)
        self._requests: dict[str, list[Sequence]] = {}
        """Sequences that have not ended, by request."""
        self._waiting = WaitingQueue()
        self._running: dict[int, Sequence] = {}
        """Those that own blocks, by id."""
        self._in_order: list[Sequence] = []
        """The same, by rank."""
        self._deadlines = Deadlines()
        self._admission_rate = AdmissionRate()
        self._queue_times: list[float] = []
        self._next_id = 0
        self._arrivals = 0
        self._turn = 0
        self._preemptions = 0
        self._replayed_tokens = 0
        self._prompt_tokens = 0
        self._generated_tokens = 0
        self._cached_tokens = 0

    # -- entering and leaving ----------------------------------------------------------------

    def add(self, request: Request, now_s: float) -> list[TokenEvent]:
        """Queue a request; returns events when it ends at once (all its tokens are already there).

        Raises:
            InvalidRequestError: it can never run here, or its id is in use.
            DeadlineError: its deadline has passed.
            OverloadedError: a queue is full.
        """
        config = self.config
        if request.request_id in self._requests:
            raise InvalidRequestError(
                "request_id", f"{request.request_id!r} is in use by a running request"
            )
        check_request(request, config, now_s)
        check_room(
            request,
            config,
            queued_requests=self._waiting.num_new,
            queued_tokens=self._waiting.num_new_tokens,
            retry_after_s=self._admission_rate.retry_after_s(request.sampling.n),
        )
        self._arrivals += 1
        sequences = [
            Sequence(
                request,
                index,
                sequence_id=self._new_id(),
                arrival=self._arrivals,
                added_s=now_s,
                max_context=config.max_context,
                eos_token_ids=config.eos_token_ids,
            )
            for index in range(request.sampling.n)
        ]
        self._requests[request.request_id] = sequences
        if request.deadline_s is not None:
            self._deadlines.add(request.request_id, request.deadline_s)
        events = []
        for sequence in list(sequences):
            self._waiting.push(sequence)
            reason = sequence.finish_reason()
            if reason is not None:
                events.append(self._end(sequence, reason))
        return events

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def request_of(self, sequence_id: int) -> str | None:
        """Id of the request of a sequence that runs; None: it does not."""
        sequence = self._running.get(sequence_id)
        return None if sequence is None else sequence.request.request_id

    def has_request(self, request_id: str) -> bool:
        """The request has a sequence that has not ended."""
        return request_id in self._requests

    @property
    def has_work(self) -> bool:
        """Some sequence has not ended."""
        return bool(self._requests)

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
        return [
            event
            for request_id in self._deadlines.pop_due(now_s)
            for event in self.cancel(request_id, FinishReason.DEADLINE)
        ]

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
        if not self._waiting.discard(sequence):
            self._stop_running(sequence)
        request_id = sequence.request.request_id
        siblings = self._requests[request_id]
        siblings.remove(sequence)
        if not siblings:
            del self._requests[request_id]
            self._deadlines.discard(request_id)
        return self._event(sequence, token, reason, error)

    def _stop_running(self, sequence: Sequence) -> None:
        del self._running[sequence.sequence_id]
        del self._in_order[bisect_left(self._in_order, sequence.rank, key=by_rank)]
        self._blocks.release(sequence.block_table)
        sequence.block_table = []

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
            top_logprobs=tuple((i, p) for i, p in token.top_logprobs)
            if token and token.top_logprobs
            else (),
            finish_reason=reason,
            scores=tuple(sequence.scores) if reason and sequence.request.score_only else (),
            num_cached_tokens=sequence.num_cached,
            queued_s=sequence.queued_s,
            num_restarts=sequence.num_restarts,
            error=error,
        )

    # -- what runs next ----------------------------------------------------------------------

    def next_micro_batch(self, now_s: float) -> tuple[SequenceSlice, ...] | None:
        """Reserve and return the next micro-batch; None when nothing can run now."""
        room = self.config.max_batch_sequences
        self._turn += 1
        known = self._waiting.num_tokens
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self._in_order:
            num_pending = len(sequence.tokens) - sequence.num_scheduled
            known += num_pending
            if num_pending == 1:
                decodes.append(sequence)
            elif num_pending:
                prefills.append(sequence)
        budget = self._token_budget(known)
        slices = self._decode(decodes, min(room, budget))
        budget -= len(slices)
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
        return tuple(slices) or None

    def _token_budget(self, known: int) -> int:
        """Tokens of the next micro-batch: with several stages, each one's share of the `known` ones
        that are still to be computed, so that a lone burst of prompts keeps all of them busy."""
        config = self.config
        if config.num_stages == 1:
            return config.max_batch_tokens
        return min(config.max_batch_tokens, max(MIN_SHARED_TOKENS, -(-known // config.num_stages)))

    def _decode(self, ready: list[Sequence], limit: int) -> list[SequenceSlice]:
        """One token each of the sequences in `ready`, which come by rank: this stage's share of
        all that run, at most `limit`. None only if none of them can run."""
        count = min(limit, -(-len(self._running) // self.config.num_stages))
        if len(ready) > count:
            # Stable sorts: by priority, then who waited longest, then by rank.
            ready = sorted(sorted(ready, key=by_turn), key=by_priority)
        slices: list[SequenceSlice] = []
        for sequence in ready:
            if len(slices) == count:
                break
            num_preemptions = self._preemptions
            # It may have been preempted for one before it, or may now step back itself.
            if sequence.sequence_id in self._running and self._grow(sequence):
                slices.append(self._slice(sequence, 1))
            if self._preemptions != num_preemptions:
                slices = [part for part in slices if part.sequence_id in self._running]
        return slices

    def _slice(self, sequence: Sequence, count: int) -> SequenceSlice:
        """The next `count` tokens of a sequence, marked as sent."""
        start = sequence.num_scheduled
        end = start + count
        sequence.num_scheduled = end
        sequence.last_turn = self._turn
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
            victim = self._in_order[-1]
            self._preemptions += 1
            self._step_back(victim)
            if victim is sequence:
                return False
        sequence.block_table += self._blocks.allocate(1)
        return True

    def _step_back(self, sequence: Sequence) -> None:
        """Take a sequence's blocks; it will be computed again, with the same tokens."""
        self._stop_running(sequence)
        sequence.restart(self._new_id())
        self._waiting.push(sequence)

    def _admit_next(self, now_s: float) -> Sequence | None:
        """Start the first waiting sequence if there is room for all its known tokens."""
        sequence = self._waiting.first()
        if sequence is None or len(self._running) >= self.config.max_running_sequences:
            return None
        if self._is_shared_soon(sequence):
            return None
        cached = self._cached_beginning(sequence)
        size = self.config.block_size
        needed = -(-len(sequence.tokens) // size) - len(cached)
        available = self._blocks.num_available - self._blocks.num_cached_among(cached)
        # Each running sequence may want a block soon: without this reserve the newcomer would be
        # preempted in its turn.
        if available < needed + len(self._running):
            return None
        self._waiting.discard(sequence)
        self._blocks.take(cached)
        sequence.block_table = [*cached, *self._blocks.allocate(needed)]
        sequence.num_scheduled = sequence.num_applied = len(cached) * size
        sequence.num_registered = len(cached)
        if not sequence.was_admitted:
            sequence.was_admitted = True
            sequence.num_cached = min(sequence.num_scheduled, sequence.num_prompt)
            self._cached_tokens += sequence.num_cached
            self._prompt_tokens += sequence.num_prompt
            self._admission_rate.note(now_s)
            sequence.queued_s = now_s - sequence.added_s
            self._queue_times.append(sequence.queued_s)
        self._running[sequence.sequence_id] = sequence
        insort(self._in_order, sequence, key=by_rank)
        return sequence

    def _is_shared_soon(self, sequence: Sequence) -> bool:
        """Another of the request's n sequences is computing a long prompt just now: in a moment its
        blocks can be shared, instead of computed and stored n times."""
        request, config = sequence.request, self.config
        num_tokens = sequence.num_prompt * request.sampling.n
        if num_tokens <= config.max_batch_tokens or request.score_only:
            return False
        shared = (sequence.num_prompt - 1) // config.block_size * config.block_size
        return config.enable_prefix_cache and any(
            s.sequence_id in self._running and s.num_applied < shared
            for s in self._requests[request.request_id]
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
        """Take in what came back for a micro-batch, in the order in which they were formed. Results
        for sequences that ended or stepped back are dropped."""
        tokens = {token.sequence_id: token for token in result.tokens}
        scores = {score.sequence_id: score for score in result.scores}
        size = self.config.block_size
        events = []
        for part in slices:
            sequence = self._running.get(part.sequence_id)
            if sequence is None:
                continue
            sequence.num_applied += len(part.token_ids)
            if sequence.num_applied // size != sequence.num_registered:
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
        if self.config.enable_prefix_cache:
            digests = sequence.digests(full, self.config.block_size)
            for i in range(sequence.num_registered, full):
                self._blocks.register(sequence.block_table[i], digests[i])
        sequence.num_registered = full

    def reset_in_flight(self, num_blocks: int | None = None) -> list[TokenEvent]:
        """The stages' caches are lost: every running sequence is computed again from its tokens.

        Args:
            num_blocks: that there are from now on; default: as many as before.
        Returns:
            the ends of those that cannot go on: they were under way at too many losses in a row,
            of which they may be the cause, or are too long for what there is now.
        """
        for sequence in list(self._in_order):
            self._replayed_tokens += sequence.num_applied
            if sequence.num_scheduled > sequence.num_applied:
                sequence.note_loss()
            self._step_back(sequence)
        if num_blocks is not None:
            self.config = replace(self.config, num_blocks=num_blocks)
        self._blocks = KVBlocks(self.config.num_blocks)
        events = []
        for request_id, siblings in list(self._requests.items()):
            error = self._why_not_again(siblings)
            if error:
                events += self.cancel(request_id, FinishReason.ERROR, error)
        return events

    def _why_not_again(self, siblings: list[Sequence]) -> str:
        """Why a request is not to be computed again; empty: it is."""
        num_losses = max(sequence.num_losses for sequence in siblings)
        if num_losses >= MAX_LOSSES:
            return (
                f"the pipeline was lost {num_losses} times in a row while it computed this request"
            )
        longest, room = max(s.max_length for s in siblings), self.config.max_context
        if longest > room:
            return (
                f"the request may need {longest} tokens of KV cache, which holds {room} since the "
                "pipeline came back"
            )
        return ""

    # -- watching ----------------------------------------------------------------------------

    def counts(self) -> SchedulerCounts:
        """A snapshot."""
        blocks = self._blocks
        return SchedulerCounts(
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            num_queued_tokens=self._waiting.num_new_tokens,
            num_blocks=blocks.num_blocks,
            num_blocks_used=blocks.num_blocks - blocks.num_available,
            num_blocks_cached=blocks.num_cached,
            num_preemptions=self._preemptions,
            num_replayed_tokens=self._replayed_tokens,
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
        sequences = [s for siblings in self._requests.values() for s in siblings]
        assert self._in_order == sorted(self._running.values(), key=by_rank)
        self._blocks.check_integrity([s.block_table for s in sequences])
        waiting = [s for s in sequences if s.sequence_id not in self._running]
        assert len(sequences) == len(waiting) + len(self._running), "an ended sequence runs"
        self._waiting.check_integrity(waiting)
        assert all(not s.block_table for s in waiting), "a waiting sequence owns blocks"
        size = self.config.block_size
        for sequence in self._in_order:
            assert sequence.num_applied <= sequence.num_scheduled <= len(sequence.tokens)
            assert sequence.num_scheduled <= len(sequence.block_table) * size
        with_deadline = [s for s in self._requests.values() if s[0].request.deadline_s is not None]
        assert len(self._deadlines) == len(with_deadline)

"""The state of one sequence: its tokens, how far they are computed, and the blocks that it owns."""

from __future__ import annotations

from dataclasses import replace

from tightfit.cluster.request import FinishReason, Request
from tightfit.cluster.scheduling.kv_blocks import block_digest
from tightfit.workers.api import SamplingSpec

MASK64 = 2**64 - 1

Rank = tuple[int, int, int]
"""Order of service (-priority, arrival, index): the least runs first and is preempted last."""


def sequence_seed(seed: int, index: int) -> int:
    """The 64-bit key of one of a request's sequences (splitmix64, Steele et al. 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


class Sequence:
    """One of a request's n sequences.

    There is no prefill phase and no decode phase, only `num_scheduled` catching up with `tokens`.
    """

    __slots__ = (
        "_base", "_digests", "_has_penalty", "_lost_at", "added_s", "block_table", "end_ids",
        "index", "last_turn", "max_length", "num_applied", "num_cached", "num_losses", "num_prompt",
        "num_registered", "num_restarts", "num_scheduled", "queued_s", "rank", "request",
        "scores", "sequence_id", "tokens", "was_admitted",
    )  # fmt: skip

    def __init__(
        self,
        request: Request,
        index: int,
        *,
        sequence_id: int,
        arrival: int,
        max_context: int,
        eos_token_ids: frozenset[int],
        added_s: float,
    ) -> None:
        sampling = request.sampling
        self.request, self.index = request, index
        self.sequence_id = sequence_id
        self.rank: Rank = (-request.priority, arrival, index)
        self.added_s = added_s
        self.tokens = [*request.prompt_token_ids, *request.resume_token_ids]
        self.num_prompt = len(request.prompt_token_ids)
        self.max_length = min(self.num_prompt + sampling.max_tokens, max_context)
        eos = frozenset() if sampling.ignore_eos else eos_token_ids
        self.end_ids = eos | frozenset(sampling.stop_token_ids)
        self.num_scheduled = 0
        """Tokens sent to the stages (or taken from the prefix cache)."""
        self.num_applied = 0
        """Tokens whose step has come back: their KV is written on every stage."""
        self.num_registered = 0
        """Full blocks offered to the prefix cache."""
        self.num_cached = 0
        self.block_table: list[int] = []
        self.scores: list[float] = []
        self.was_admitted = False
        """It ran at some time: it no longer counts as queued."""
        self.queued_s: float | None = None
        """Seconds that it waited until then."""
        self.num_restarts = 0
        self.num_losses = 0
        """How often the pipeline was lost while a step of it was under way, and it had not come
        further than the time before."""
        self._lost_at = 0
        self.last_turn = 0
        """Number of the micro-batch that it was last in."""
        self._has_penalty = (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
        self._digests: list[bytes] = []
        self._base = SamplingSpec(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=sequence_seed(sampling.seed, index),
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            logit_bias=list(sampling.logit_bias),
            num_logprobs=sampling.logprobs,
            num_prompt_tokens=self.num_prompt,
        )

    @property
    def num_output(self) -> int:
        """Tokens generated, resumed ones included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Known tokens that have not been sent to the stages."""
        return len(self.tokens) - self.num_scheduled

    def finish_reason(self) -> FinishReason | None:
        """Whether the tokens so far end the sequence."""
        if self.request.score_only:
            return None
        output = self.num_output
        if (
            output
            and output >= self.request.sampling.min_tokens
            and self.tokens[-1] in self.end_ids
        ):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.max_length else None

    def sampling_spec(self) -> SamplingSpec:
        """How the next token is drawn."""
        spec = self._base
        if self.num_output < self.request.sampling.min_tokens:
            spec = replace(spec, banned_token_ids=sorted(self.end_ids))
        if self._has_penalty:
            spec = replace(spec, history_token_ids=list(self.tokens))
        return spec

    def digests(self, num_blocks: int, block_size: int) -> list[bytes]:
        """Of the first `num_blocks` full blocks; computed once each."""
        while len(self._digests) < num_blocks:
            first = len(self._digests) * block_size
            parent = self._digests[-1] if self._digests else b""
            self._digests.append(block_digest(parent, self.tokens[first : first + block_size]))
        return self._digests[:num_blocks]

    def note_loss(self) -> None:
        """The pipeline was lost while a step of this sequence was under way."""
        if self.num_applied > self._lost_at:
            self._lost_at, self.num_losses = self.num_applied, 0
        self.num_losses += 1

    def restart(self, sequence_id: int) -> None:
        """Compute everything anew under a new id, so that results under way are not mistaken for
        it."""
        self.sequence_id = sequence_id
        self.num_restarts += 1
        self.num_scheduled = self.num_applied = self.num_registered = 0
        self.block_table = []
        self.scores = []

"""Requests and what comes back for them, inside the control plane."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class FinishReason(Enum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence token or one of `stop_token_ids`."""
    LENGTH = "length"
    """`max_tokens` reached, or the context is full."""
    STOP_SEQUENCE = "stop_sequence"
    """One of the stop strings."""
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request wants its tokens drawn. Ranges are checked where requests enter."""

    max_tokens: int = 16
    """Most tokens generated, resumed ones included; at least 1 (0 only to score)."""
    min_tokens: int = 0
    """Before this many, no end token can be drawn."""
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    """Any 64-bit number."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """None: none; k: log-probability of each token and of the k most probable ones."""
    n: int = 1
    """Sequences generated for the prompt."""
    logit_bias: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt, tokenised and validated."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Higher runs first; equal ones in order of arrival."""
    resume_token_ids: tuple[int, ...] = ()
    """Output tokens that the caller already has; only with n = 1."""
    deadline_s: float | None = None
    """On the clock that the scheduler is given; None: no limit."""
    score_only: bool = False
    """Return the log-probabilities of the prompt's tokens but the first; generate nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """News of one sequence. With `finish_reason` set it is the last; it may then bear no token."""

    request_id: str
    index: int
    """Which of the request's n sequences."""
    token_offset: int
    """Index of `token_id` in the sequence's output (resumed tokens count), or its length at the
    end."""
    token_id: int | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    scores: tuple[float, ...] = ()
    """For `score_only` requests, on the last event: every prompt token's but the first's."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV was taken from the prefix cache."""
    queued_s: float | None = None
    """Seconds that the sequence waited before it first ran; None: it never did."""
    num_restarts: int = 0
    """How often it had to be computed anew from its tokens, as its KV blocks were taken or lost."""
    error: str = ""
    """With FinishReason.ERROR: why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTiming:
    """One step of a request through the stages."""

    step: int
    """Number of the micro-batch in its epoch."""
    epoch: int
    num_tokens: int
    """Of this request, in the micro-batch."""
    num_batch_tokens: int
    """Of all requests, in the micro-batch."""
    started_unix_s: tuple[float, ...]
    """When each stage began to compute, by its own host's clock."""
    forward_s: tuple[float, ...]
    """Seconds that each stage computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """The pipeline is lost."""

    reason: str
    lost_s: float
    """time.monotonic when that was noticed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The pipeline was lost, and came back."""

    epoch: int
    """That began then."""
    reason: str
    """Why it was lost."""
    lost_s: float
    """time.monotonic when that was noticed."""
    resumed_s: float
    """time.monotonic when micro-batches could be sent again."""
    num_replayed_tokens: int
    """Whose KV had been computed, and has to be once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """A request that has ended: what its metrics, its log line and its trace are made of. No text
    and no token ids."""

    request_id: str
    method: str
    """The gRPC method's name."""
    finish_reason: FinishReason
    started_s: float
    """When the call came, on `time.monotonic`."""
    ended_s: float
    tokenized_s: float
    """When its prompt was tokens and it was queued."""
    admitted_s: float | None
    """When its first tokens were sent to the stages; None: never, or nobody heard of it."""
    first_token_s: float | None
    recomputed_s: tuple[float, ...] = ()
    """When one of its sequences went on after it had been computed anew."""
    recoveries: tuple[Recovery, ...] = ()
    """Of the pipeline, while it was under way."""
    loss: Loss | None = None
    """Of the pipeline, from which it had not come back when the request ended."""
    num_prompt_tokens: int
    num_cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""
    num_generated_tokens: int
    """In all its sequences, resumed ones not included."""
    num_sequences: int
    client: str | None = None
    """Name of the access token that it came with."""
    trace_id: str | None = None
    """Of its trace, in hexadecimal; None: it has none."""

    @property
    def duration_s(self) -> float:
        """From its arrival to its end."""
        return self.ended_s - self.started_s

    @property
    def queue_s(self) -> float | None:
        """That it waited to run."""
        return None if self.admitted_s is None else self.admitted_s - self.tokenized_s

    @property
    def ttft_s(self) -> float | None:
        """From its arrival to its first token."""
        return None if self.first_token_s is None else self.first_token_s - self.started_s

    @property
    def prefill_s(self) -> float | None:
        """From the end of its wait to its first token."""
        if self.first_token_s is None or self.admitted_s is None:
            return None
        return self.first_token_s - self.admitted_s

    @property
    def decode_s(self) -> float | None:
        """From its first token to its end."""
        return None if self.first_token_s is None else self.ended_s - self.first_token_s

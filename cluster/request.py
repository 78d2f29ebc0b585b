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
    error: str = ""
    """With FinishReason.ERROR: why."""

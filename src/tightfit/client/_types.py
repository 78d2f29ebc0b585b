"""What the client takes and gives: plain data, no protobuf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import grpc


class Message(TypedDict):
    """One message of a conversation."""

    role: str
    content: str


Prompt = str | Sequence[int] | Sequence[Message]
"""Text, token ids, or a conversation."""


class TightfitRpcError(Exception):
    """A call that failed."""

    def __init__(self, code: grpc.StatusCode, details: str, retry_after_s: float | None) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code
        """gRPC status."""
        self.details = details
        """What the service says: the field, the limit, the reason."""
        self.retry_after_s = retry_after_s
        """When another try makes sense, if the service said so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Log-probabilities at one output position."""

    token_id: int
    logprob: float
    """Natural logarithm, under the unmodified model."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most probable first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a call cost, in tokens."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """News of one sequence."""

    request_id: str
    index: int
    token_offset: int
    """Output tokens before this chunk."""
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Position, ...]
    finish_reason: str | None
    """"stop", "length", "stop_sequence", …; None while the sequence goes on."""
    usage: Usage | None
    """In the last chunk of the call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One generated sequence."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[Position, ...]
    finish_reason: str
    usage: Usage
    """Of the whole call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Log-probabilities of a text."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of every token but the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a service serves."""

    name: str
    family: str
    num_layers: int
    vocab_size: int
    max_context_tokens: int
    weight_format: str
    num_stages: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool


class SamplingOptions(TypedDict, total=False):
    """Keyword arguments of generate and stream; see the proto for ranges and defaults."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    n: int
    logit_bias: Mapping[int, float]

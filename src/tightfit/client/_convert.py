"""Plain data to protobuf and back, for both clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc

from tightfit.client._types import (
    Chunk,
    Generation,
    Model,
    Position,
    Prompt,
    SamplingOptions,
    Scores,
    TightfitRpcError,
    Usage,
)
from tightfit.v1 import common_pb2, inference_pb2

MAX_MESSAGE_BYTES = 64 * 2**20
OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
)


def _input(prompt: Prompt) -> dict[str, Any]:
    """The field that a prompt goes to."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    items: list[Any] = list(prompt)
    if items and isinstance(items[0], dict):
        return {"chat": common_pb2.Chat(messages=[common_pb2.ChatMessage(**m) for m in items])}
    return {"token_ids": common_pb2.TokenIds(ids=items)}


def generate_request(
    prompt: Prompt,
    options: SamplingOptions,
    *,
    model: str,
    request_id: str,
    priority: int,
    resume_token_ids: Sequence[int],
) -> inference_pb2.GenerateRequest:
    """A request of the service."""
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        model=model,
        sampling=inference_pb2.Sampling(**options),
        priority=priority,
        resume_token_ids=resume_token_ids,
        **_input(prompt),
    )


def score_request(
    prompt: str | Sequence[int], *, model: str, request_id: str, priority: int
) -> inference_pb2.ScoreRequest:
    """A request of the service."""
    return inference_pb2.ScoreRequest(
        request_id=request_id, model=model, priority=priority, **_input(prompt)
    )


def tokenize_request(prompt: Prompt, *, model: str) -> inference_pb2.TokenizeRequest:
    """A request of the service."""
    return inference_pb2.TokenizeRequest(model=model, **_input(prompt))


def _reason(value: int) -> str | None:
    name = common_pb2.FinishReason.Name(value).removeprefix("FINISH_REASON_").lower()  # type: ignore[arg-type]
    return None if value == common_pb2.FINISH_REASON_UNSPECIFIED else name


def _positions(items: Any) -> tuple[Position, ...]:
    return tuple(
        Position(
            token_id=item.token.token_id,
            logprob=item.token.logprob,
            top=tuple((top.token_id, top.logprob) for top in item.top),
        )
        for item in items
    )


def _usage(usage: common_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        cached_tokens=usage.cached_tokens,
    )


def chunk(message: inference_pb2.GenerateStreamResponse) -> Chunk:
    """From the service."""
    return Chunk(
        request_id=message.request_id,
        index=message.index,
        token_offset=message.token_offset,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_positions(message.logprobs),
        finish_reason=_reason(message.finish_reason),
        usage=_usage(message.usage) if message.HasField("usage") else None,
    )


def generations(message: inference_pb2.GenerateResponse) -> list[Generation]:
    """From the service, by index."""
    return [
        Generation(
            request_id=message.request_id,
            index=output.index,
            text=output.text,
            token_ids=tuple(output.token_ids),
            logprobs=_positions(output.logprobs),
            finish_reason=_reason(output.finish_reason) or "",
            usage=_usage(message.usage),
        )
        for output in message.outputs
    ]


def scores(message: inference_pb2.ScoreResponse) -> Scores:
    """From the service."""
    return Scores(token_ids=tuple(message.token_ids), logprobs=tuple(message.logprobs))


def model(message: inference_pb2.GetModelResponse) -> Model:
    """From the service."""
    return Model(
        name=message.name,
        family=message.family,
        num_layers=message.num_layers,
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        weight_format=message.weight_format,
        num_stages=message.num_stages,
        eos_token_ids=tuple(message.eos_token_ids),
        has_chat_template=message.has_chat_template,
    )


def rpc_error(error: Any) -> TightfitRpcError:
    """What a failed call says (`grpc.RpcError` of either kind)."""
    retry_after_s = None
    for key, value in error.trailing_metadata() or ():
        if key == "retry-after-ms" and str(value).isdecimal():
            retry_after_s = int(value) / 1000
    code = error.code() or grpc.StatusCode.UNKNOWN
    return TightfitRpcError(code, error.details() or "", retry_after_s)

"""Errors to gRPC statuses, one mapping for every method."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

from tightfit.cluster.errors import OverloadedError, TightfitError

log = logging.getLogger(__name__)

MAX_DETAIL_BYTES = 4095
"""Of a status message as it travels. Metadata over 8 KB may be refused on the way."""
MAX_RICH_DETAIL_BYTES = 1024
"""The same, of a message that travels a second time, inside google.rpc.Status."""

Context = grpc.aio.ServicerContext[Any, Any]
T = TypeVar("T")


def truncate(detail: str, max_bytes: int = MAX_DETAIL_BYTES) -> str:
    """The longest beginning that travels in `max_bytes`, with an ellipsis if it is not all.

    gRPC sends every byte that is not printable ASCII as three.
    """
    text = detail.encode("utf-8", "replace").decode()
    if len(text) <= max_bytes // 9 or _wire_bytes(text) <= max_bytes:
        return text
    room = max_bytes - _wire_bytes("…")
    for end, character in enumerate(text):
        room -= _wire_bytes(character)
        if room < 0:
            return text[:end] + "…"
    raise AssertionError("it was too long")


def _wire_bytes(text: str) -> int:
    return sum(1 if 0x20 <= byte <= 0x7E and byte != 0x25 else 3 for byte in text.encode())


def _retry_trailers(error: OverloadedError, detail: str) -> tuple[tuple[str, str | bytes], ...]:
    """When to try again, for people and simple clients, and as google.rpc.RetryInfo."""
    delay_ms = max(1, round(error.retry_after_s * 1000))
    info, packed = RetryInfo(), AnyMessage()
    info.retry_delay.FromMilliseconds(delay_ms)
    packed.Pack(info)
    number: int = grpc.StatusCode[error.status].value[0]
    status = Status(code=number, message=detail, details=[packed])
    return (
        ("retry-after-ms", str(delay_ms)),
        ("grpc-status-details-bin", status.SerializeToString()),
    )


async def abort(context: Context, error: BaseException) -> NoReturn:
    """End a call with the status of an error; what nobody expected gets an id to find it by."""
    if isinstance(error, OverloadedError):
        detail = truncate(str(error), MAX_RICH_DETAIL_BYTES)
        context.set_trailing_metadata(_retry_trailers(error, detail))
        await context.abort(grpc.StatusCode[error.status], detail)
    if isinstance(error, TightfitError):
        await context.abort(grpc.StatusCode[error.status], truncate(str(error)))
    incident = secrets.token_hex(6)
    log.error("incident %s", incident, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, f"internal error; the service's log has it as incident {incident}"
    )
    raise AssertionError("abort returned")


async def unary(context: Context, work: Callable[[], Awaitable[T]]) -> T:
    """Answer with what `work` returns, or with its error's status."""
    try:
        return await work()
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        await abort(context, error)


async def stream(context: Context, items: AsyncGenerator[T, None]) -> AsyncIterator[T]:
    """Pass the items of an asynchronous generator on, or end with its error's status."""
    try:
        async with aclosing(items):
            async for item in items:
                yield item
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        await abort(context, error)


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """Answers INVALID_ARGUMENT to bytes that are not the message that a method takes.

    gRPC itself would log a traceback for each and blame the service.
    """

    PREFIX = "/tightfit."

    def __init__(self) -> None:
        self._guarded: dict[str, Any] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's handler, guarded if it is one of ours."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(self.PREFIX):
            return handler
        if method not in self._guarded:
            self._guarded[method] = _guarded(handler)
        return self._guarded[method]


class _Malformed:
    """Stands for a request that cannot be read."""

    def __init__(self, error: Exception) -> None:
        self.reason = f"the request is not a valid message of this method: {error}"


def _guarded(handler: Any) -> Any:
    decode = handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception as error:  # protobuf's own DecodeError, and ValueError
            return _Malformed(error)

    async def answer(request: Any, context: Context) -> Any:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, truncate(request.reason))
        return await handler.unary_unary(request, context)

    async def answer_with_stream(request: Any, context: Context) -> AsyncIterator[Any]:
        if isinstance(request, _Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, truncate(request.reason))
        async with aclosing(handler.unary_stream(request, context)) as items:
            async for item in items:
                yield item

    if handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(
            answer_with_stream, read, handler.response_serializer
        )
    return grpc.unary_unary_rpc_method_handler(answer, read, handler.response_serializer)

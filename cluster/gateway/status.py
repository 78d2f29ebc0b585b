"""Errors to gRPC statuses, one mapping for every method."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NoReturn

import grpc

from tightfit.cluster.errors import OverloadedError, TightfitError

log = logging.getLogger(__name__)

MAX_DETAIL_BYTES = 4000
"""HTTP/2 trailers over 8 KB are dropped by some proxies; gRPC percent-encodes, so stay well
below."""

Context = grpc.aio.ServicerContext[Any, Any]


def truncate(detail: str) -> str:
    """At most `MAX_DETAIL_BYTES` of UTF-8, no character split."""
    encoded = detail.encode("utf-8", "replace")
    if len(encoded) <= MAX_DETAIL_BYTES:
        return encoded.decode()
    return encoded[: MAX_DETAIL_BYTES - 3].decode("utf-8", "ignore") + "…"


async def abort(context: Context, error: BaseException) -> NoReturn:
    """End a call with the status of an error; what nobody expected gets an id to find it by."""
    if isinstance(error, TightfitError):
        if isinstance(error, OverloadedError):
            delay_ms = max(1, round(error.retry_after_s * 1000))
            context.set_trailing_metadata((("retry-after-ms", str(delay_ms)),))
        await context.abort(grpc.StatusCode[error.status], truncate(str(error)))
    incident = secrets.token_hex(6)
    log.error("incident %s", incident, exc_info=error)
    await context.abort(
        grpc.StatusCode.INTERNAL, f"internal error; the service's log has it as incident {incident}"
    )
    raise AssertionError("abort returned")


async def unary(context: Context, work: Callable[[], Awaitable[Any]]) -> Any:
    """Answer with what `work` returns, or with its error's status."""
    try:
        return await work()
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        await abort(context, error)


async def stream(context: Context, items: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Pass items on, or end with their error's status."""
    try:
        async for item in items:
            yield item
    except (asyncio.CancelledError, grpc.aio.AbortError, GeneratorExit):
        raise
    except Exception as error:
        await abort(context, error)

"""Interceptors: who may call which method, how much, and the audit log of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc

from tightfit.cluster.errors import ForbiddenError, TightfitError, UnauthenticatedError
from tightfit.cluster.gateway.status import Context, abort
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.security.audit import AuditLog
from tightfit.cluster.security.caller import Caller, current_caller
from tightfit.cluster.security.limits import Usage
from tightfit.cluster.security.store import TokenStore
from tightfit.v1 import cluster_pb2, inference_pb2

INFERENCE = f"/{inference_pb2.DESCRIPTOR.services_by_name['InferenceService'].full_name}/"
CLUSTER = f"/{cluster_pb2.DESCRIPTOR.services_by_name['ClusterService'].full_name}/"
OPEN = "/grpc.health.v1.Health/"
"""Answered without a token: probes have none, and learn only whether the service is up."""
FOR_ADMINS = frozenset({f"{CLUSTER}Drain"})
TAKE_TOKENS = frozenset(f"{INFERENCE}{name}" for name in ("Generate", "GenerateStream", "Score"))
HEADER = "authorization"

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySecurity:
    """What the gateway asks of callers; by default nothing."""

    credentials: grpc.ServerCredentials | None = None
    """For TLS; None: what travels can be read and changed on its way."""
    tokens: TokenStore | None = None
    """Tokens that are answered; None: no token is asked for."""
    audit: AuditLog | None = None


class Authenticate(grpc.aio.ServerInterceptor):
    """Answers only who shows a token, within that token's role and limits.

    The outermost interceptor but `Audit`: of a call without a token no byte is interpreted, and
    whether a method exists is not told.

    Args:
        store: the tokens in force.
        metrics: where refusals are counted.
    """

    def __init__(self, store: TokenStore, metrics: Metrics) -> None:
        self._store, self._metrics = store, metrics
        self._usages: dict[str, Usage] = {}
        self._wrapped: dict[str, Any] = {}

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler, if this caller may have it; else one that refuses."""
        method = handler_call_details.method
        if method.startswith(OPEN):
            return await continuation(handler_call_details)
        try:
            current_caller.set(self._caller(handler_call_details))
            self._permit(method)
        except TightfitError as error:
            self._metrics.count_refused(error.status)
            return _refusing(error)
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith((INFERENCE, CLUSTER)):
            return handler
        if method not in self._wrapped:
            self._wrapped[method] = self._limited(method, handler)
        return self._wrapped[method]

    # -- who ---------------------------------------------------------------------------------

    def _caller(self, details: grpc.HandlerCallDetails) -> Caller:
        """Whose token came with the call.

        Raises:
            UnauthenticatedError: none, several, or one that is not in force.
        """
        values = [str(value) for key, value in details.invocation_metadata or () if key == HEADER]
        scheme, _, secret = values[0].partition(" ") if len(values) == 1 else ("", "", "")
        if scheme.lower() != "bearer":
            raise UnauthenticatedError(
                'a token is needed: one "authorization" entry, "Bearer " and the token'
            )
        token = self._store.find(secret.strip())
        if token is None:
            raise UnauthenticatedError("the token is not known here, or was revoked")
        if self._store.has_expired(token):
            raise UnauthenticatedError(f"the token {token.name!r} has expired")
        now_s = time.monotonic()
        usage = self._usages.get(token.name)
        if usage is None:
            self._forget_revoked()
            usage = self._usages[token.name] = Usage(token, now_s)
        else:
            usage.follow(token, now_s)
        return Caller(token=token, usage=usage)

    def _forget_revoked(self) -> None:
        """So that usages do not outnumber the tokens that there are."""
        for name, usage in list(self._usages.items()):
            if not usage.num_calls and not self._store.has_name(name):
                del self._usages[name]

    @staticmethod
    def _permit(method: str) -> None:
        caller = current_caller.get()
        if method in FOR_ADMINS and (caller is None or caller.token.role != "admin"):
            raise ForbiddenError(f"{method.rpartition('/')[2]} needs a token with the role admin")

    # -- how much ----------------------------------------------------------------------------

    def _limited(self, method: str, handler: Any) -> Any:
        """The handler, within its caller's limits; a stream ends when its token does."""

        async def answer(request: Any, context: Context) -> Any:
            await self._begin(method, context)
            return await handler.unary_unary(request, context)

        async def answer_with_stream(request: Any, context: Context) -> AsyncIterator[Any]:
            caller = await self._begin(method, context)
            async with aclosing(handler.unary_stream(request, context)) as items:
                async for item in items:
                    yield item
                    if self._has_ended(caller):
                        await abort(context, UnauthenticatedError("the token has ended meanwhile"))

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                answer_with_stream, handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    async def _begin(self, method: str, context: Context) -> Caller:
        caller = current_caller.get()
        assert caller is not None, "it was set for this call, in this task"
        if method.startswith(INFERENCE):
            try:
                caller.usage.begin(time.monotonic(), takes_tokens=method in TAKE_TOKENS)
            except TightfitError as error:
                self._metrics.count_refused(error.status)
                await abort(context, error)
            # Not when the handler ends: a stream's may wait long behind a client that stopped
            # reading.
            context.add_done_callback(lambda _: caller.usage.end())  # type: ignore[arg-type]
        return caller

    def _has_ended(self, caller: Caller) -> bool:
        return self._store.current(caller.token) is None or self._store.has_expired(caller.token)


def _refusing(error: TightfitError) -> Any:
    """A handler for any method that does not even wait for a request."""

    async def refuse(_requests: Any, context: Context) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)


class Audit(grpc.aio.ServerInterceptor):
    """Writes every call of ClusterService into the audit log, also those that are refused."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """The method's handler, whose end is written down."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(CLUSTER):
            return handler
        return self._noted(method.rpartition("/")[2], handler)

    def _noted(self, name: str, handler: Any) -> Any:
        """All methods of the service are unary; a refusal takes a stream, and reads none of it."""
        caller = current_caller.get()

        async def answer(request: Any, context: Context) -> Any:
            result = grpc.StatusCode.CANCELLED
            try:
                answered = await (handler.unary_unary or handler.stream_stream)(request, context)
                result = grpc.StatusCode.OK
                return answered
            except grpc.aio.AbortError:
                result = _status(context)
                raise
            finally:
                names = list(context.auth_context().get("x509_common_name", ()))
                self._audit.write(
                    name,
                    caller=caller.token.name if caller is not None else None,
                    certificate=names[0].decode("utf-8", "replace") if names else None,
                    peer=context.peer(),
                    result=result.name,
                )

        if handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(
                answer, handler.request_deserializer, handler.response_serializer
            )
        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )


def _status(context: Context) -> grpc.StatusCode:
    """What a call was aborted with: gRPC keeps its number."""
    number: Any = context.code()
    return next(code for code in grpc.StatusCode if number in (code, code.value[0]))

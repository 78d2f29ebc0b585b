"""The asyncio client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Self, Unpack

import grpc

from tightfit.client import _convert
from tightfit.client._security import Metadata, call_metadata, channel_options
from tightfit.client._types import Chunk, Generation, Model, Prompt, SamplingOptions, Scores
from tightfit.v1 import (
    cluster_pb2,
    cluster_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
)


class AsyncClient:
    """Talks to one service, in the event loop that made it. All calls raise TightfitRpcError.

    Args:
        target: host:port.
        timeout_s: deadline of every call, in seconds; the service stops working on it then.
        credentials: for TLS, such as `tls_credentials` makes; None: what travels can be read and
            changed on its way.
        token: sent with every call; None: none.
        insecure_token: send the token to another machine even without TLS.
        metadata: sent with every call as well, such as a `traceparent` (W3C Trace Context).

    Raises:
        ValueError: there is a token, no TLS, and the target is another machine.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_s: float | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        insecure_token: bool = False,
        metadata: Metadata = (),
    ) -> None:
        self._metadata = call_metadata(
            target, token, is_encrypted=credentials is not None, insecure_token=insecure_token
        )
        self._metadata += tuple(metadata)
        options = channel_options(target)
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )
        self._timeout_s = timeout_s
        self._inference: Any = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster: Any = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connection up; running calls are cancelled."""
        await self._channel.close()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise _convert.rpc_error(error) from error

    async def generate_n(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """All n sequences, when they have ended; see `Client.generate_n`."""
        request = _convert.generate_request(
            prompt, sampling, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids,
        )  # fmt: skip
        return _convert.generations(await self._call(self._inference.Generate, request))

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """The first (with n = 1: the only) sequence; see `Client.generate_n`."""
        sequences = await self.generate_n(
            prompt, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids, **sampling,
        )  # fmt: skip
        return sequences[0]

    async def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks as they come; closing the generator cancels the request.

        A loop that is left early does not close it: use `contextlib.aclosing` around it.
        """
        request = _convert.generate_request(
            prompt, sampling, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids,
        )  # fmt: skip
        call = self._inference.GenerateStream(
            request, timeout=self._timeout_s, metadata=self._metadata
        )
        try:
            async for message in call:
                yield _convert.chunk(message)
        except grpc.aio.AioRpcError as error:
            raise _convert.rpc_error(error) from error
        finally:
            call.cancel()

    async def score(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
    ) -> Scores:
        """Log-probability of every token of a text but the first."""
        request = _convert.score_request(
            prompt, model=model, request_id=request_id, priority=priority
        )
        return _convert.scores(await self._call(self._inference.Score, request))

    async def tokenize(self, prompt: str | Sequence[Any], *, model: str = "") -> tuple[int, ...]:
        """Token ids of a text or a conversation."""
        request = _convert.tokenize_request(prompt, model=model)
        return tuple((await self._call(self._inference.Tokenize, request)).token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        text: str = (await self._call(self._inference.Detokenize, request)).text
        return text

    async def model(self) -> Model:
        """What is served."""
        request = inference_pb2.GetModelRequest()
        return _convert.model(await self._call(self._inference.GetModel, request))

    async def status(self) -> cluster_pb2.GetStatusResponse:
        """Stages, memory and load now."""
        status: cluster_pb2.GetStatusResponse = await self._call(
            self._cluster.GetStatus, cluster_pb2.GetStatusRequest()
        )
        return status

    async def drain(self) -> int:
        """Have the service take no new requests and end after the running ones; how many those
        are."""
        answer = await self._call(self._cluster.Drain, cluster_pb2.DrainRequest())
        count: int = answer.unfinished_requests
        return count

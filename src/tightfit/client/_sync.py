"""The blocking client."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar, Unpack

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

T = TypeVar("T")


class Client:
    """Talks to one service; safe to share between threads. All calls raise TightfitRpcError.

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
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        )
        self._timeout_s = timeout_s
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._cluster = cluster_pb2_grpc.ClusterServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the connection up; running calls are cancelled."""
        self._channel.close()

    def _call(self, method: Callable[..., T], request: Any) -> T:
        try:
            return method(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _convert.rpc_error(error) from error

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Generation:
        """The first (with n = 1: the only) sequence; see `generate_n`."""
        return self.generate_n(
            prompt, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids, **sampling,
        )[0]  # fmt: skip

    def generate_n(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> list[Generation]:
        """All n sequences, when they have ended.

        Args:
            prompt: text, token ids, or a conversation.
            model: name of the model wanted; empty: the one served.
            request_id: name for the request in logs; empty: the service makes one.
            priority: higher runs first; in [-100, 100].
            resume_token_ids: output tokens that an interrupted call gave; the answer continues
                after them.
            sampling: see `SamplingOptions`.
        """
        request = _convert.generate_request(
            prompt, sampling, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids,
        )  # fmt: skip
        return _convert.generations(self._call(self._inference.Generate, request))

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        request_id: str = "",
        priority: int = 0,
        resume_token_ids: Sequence[int] = (),
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Chunk]:
        """Chunks as they come; see `generate_n`. Leaving the loop early cancels the request."""
        request = _convert.generate_request(
            prompt, sampling, model=model, request_id=request_id, priority=priority,
            resume_token_ids=resume_token_ids,
        )  # fmt: skip
        call = self._inference.GenerateStream(
            request, timeout=self._timeout_s, metadata=self._metadata
        )
        try:
            for message in call:
                yield _convert.chunk(message)
        except grpc.RpcError as error:
            raise _convert.rpc_error(error) from error
        finally:
            call.cancel()

    def score(
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
        return _convert.scores(self._call(self._inference.Score, request))

    def tokenize(self, prompt: str | Sequence[Any], *, model: str = "") -> tuple[int, ...]:
        """Token ids of a text or a conversation."""
        request = _convert.tokenize_request(prompt, model=model)
        return tuple(self._call(self._inference.Tokenize, request).token_ids)

    def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return self._call(self._inference.Detokenize, request).text

    def model(self) -> Model:
        """What is served."""
        return _convert.model(self._call(self._inference.GetModel, inference_pb2.GetModelRequest()))

    def status(self) -> cluster_pb2.GetStatusResponse:
        """Stages, memory and load now."""
        return self._call(self._cluster.GetStatus, cluster_pb2.GetStatusRequest())

    def drain(self) -> int:
        """Have the service take no new requests and end after the running ones; how many those
        are."""
        return self._call(self._cluster.Drain, cluster_pb2.DrainRequest()).unfinished_requests

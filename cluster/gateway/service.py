"""InferenceService: prompts in, tokens out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tightfit.cluster.chat import ChatTemplate
from tightfit.cluster.engine import Engine, RequestStream
from tightfit.cluster.errors import (
    CancelledError,
    DeadlineError,
    InvalidRequestError,
    UnavailableError,
)
from tightfit.cluster.gateway import convert
from tightfit.cluster.gateway.status import Context, stream, unary
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.request import FinishReason, Request, SamplingParams, TokenEvent
from tightfit.cluster.text_stream import TextStream
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.v1 import common_pb2, inference_pb2, inference_pb2_grpc

Generated = inference_pb2.GenerateStreamResponse


def _raise_failure(event: TokenEvent) -> None:
    """Raise what an event that is no proper end stands for."""
    if event.finish_reason is FinishReason.ERROR:
        raise UnavailableError(event.error)
    if event.finish_reason is FinishReason.CANCELLED:
        raise CancelledError("the request was cancelled")
    if event.finish_reason is FinishReason.DEADLINE:
        raise DeadlineError("the deadline passed before the request had ended")


@dataclass(slots=True, kw_only=True)
class _Progress:
    """What one call has seen so far."""

    request: Request
    started_s: float = field(default_factory=time.monotonic)
    texts: list[TextStream]
    last_token_s: list[float | None]
    ended: list[bool]
    completion_tokens: int = 0
    cached_tokens: int = 0

    def usage(self) -> common_pb2.Usage:
        """So far."""
        return common_pb2.Usage(
            prompt_tokens=len(self.request.prompt_token_ids),
            completion_tokens=self.completion_tokens,
            cached_tokens=self.cached_tokens,
        )


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """See protos/tightfit/v1/inference.proto.

    Args:
        engine: started, in this event loop.
        tokenizer: the model's.
        metrics: where to count.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, metrics: Metrics) -> None:
        self._engine, self._tokenizer, self._metrics = engine, tokenizer, metrics
        template = tokenizer.chat_template
        self._chat = ChatTemplate(template, tokenizer.special_tokens) if template else None

    # -- methods -----------------------------------------------------------------------------

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """One answer, when every sequence has ended."""

        async def work() -> inference_pb2.GenerateResponse:
            outputs: dict[int, inference_pb2.Output] = {}
            usage = common_pb2.Usage()
            request_id = ""
            async for chunk in self._generate(request, context):
                request_id = chunk.request_id
                output = outputs.setdefault(chunk.index, inference_pb2.Output(index=chunk.index))
                output.text += chunk.text
                output.token_ids.extend(chunk.token_ids)
                output.logprobs.extend(chunk.logprobs)
                output.finish_reason = chunk.finish_reason
                if chunk.HasField("usage"):
                    usage = chunk.usage
            return inference_pb2.GenerateResponse(
                request_id=request_id,
                outputs=[outputs[index] for index in sorted(outputs)],
                usage=usage,
            )

        answer: inference_pb2.GenerateResponse = await unary(context, work)
        return answer

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[Generated]:
        """Chunks as tokens come."""
        async for chunk in stream(context, self._generate(request, context)):
            yield chunk

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        """Log-probabilities of a given text."""

        async def work() -> inference_pb2.ScoreResponse:
            convert.check_model(request.model, self._engine.model_info)
            ids = await self._input_ids(request)
            whole = Request(
                request_id=convert.request_id(request.request_id),
                prompt_token_ids=ids,
                sampling=SamplingParams(max_tokens=0),
                priority=convert.priority(request.priority),
                deadline_s=_deadline(context),
                score_only=True,
            )
            scores: tuple[float, ...] = ()
            async for event in self._events(whole):
                scores = event.scores
            return inference_pb2.ScoreResponse(
                request_id=whole.request_id, token_ids=ids, logprobs=scores
            )

        answer: inference_pb2.ScoreResponse = await unary(context, work)
        return answer

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Text to token ids."""

        async def work() -> inference_pb2.TokenizeResponse:
            convert.check_model(request.model, self._engine.model_info)
            return inference_pb2.TokenizeResponse(token_ids=await self._input_ids(request))

        answer: inference_pb2.TokenizeResponse = await unary(context, work)
        return answer

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text."""

        async def work() -> inference_pb2.DetokenizeResponse:
            convert.check_model(request.model, self._engine.model_info)
            ids = convert.token_ids("token_ids", request.token_ids, self._engine.model_info)
            text = await asyncio.to_thread(self._tokenizer.decode, ids)
            return inference_pb2.DetokenizeResponse(text=text)

        answer: inference_pb2.DetokenizeResponse = await unary(context, work)
        return answer

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """What is served."""
        return convert.model_response(
            self._engine.model_info, has_chat_template=self._chat is not None
        )

    # -- inside ------------------------------------------------------------------------------

    async def _input_ids(
        self,
        request: inference_pb2.GenerateRequest
        | inference_pb2.ScoreRequest
        | inference_pb2.TokenizeRequest,
    ) -> tuple[int, ...]:
        """Token ids of whichever input the request has; encoding runs off the event loop."""
        kind = request.WhichOneof("input")
        if kind == "token_ids" and not isinstance(request, inference_pb2.TokenizeRequest):
            ids = request.token_ids.ids
            if not ids:
                raise InvalidRequestError("token_ids", "is empty; give at least one token id")
            return convert.token_ids("token_ids.ids", ids, self._engine.model_info)
        if kind == "chat" and not isinstance(request, inference_pb2.ScoreRequest):
            if self._chat is None:
                raise InvalidRequestError(
                    "chat", "this checkpoint has no chat template; send `prompt` or `token_ids`"
                )
            messages = convert.messages(request.chat)
            text = await asyncio.to_thread(self._chat.render, messages)
            return tuple(
                await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=False)
            )
        if kind == "prompt":
            if not request.prompt:
                raise InvalidRequestError("prompt", "is empty; give at least one character")
            return tuple(await asyncio.to_thread(self._tokenizer.encode, request.prompt))
        raise InvalidRequestError("prompt", "is missing; set one of prompt, token_ids, chat")

    async def _to_request(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> Request:
        model = self._engine.model_info
        convert.check_model(request.model, model)
        sampling = convert.sampling_params(request.sampling, model)
        resumed = convert.token_ids("resume_token_ids", request.resume_token_ids, model)
        if resumed and sampling.n > 1:
            raise InvalidRequestError("resume_token_ids", "can only be given with sampling.n = 1")
        if len(resumed) > sampling.max_tokens:
            raise InvalidRequestError(
                "resume_token_ids",
                f"has {len(resumed)} tokens; sampling.max_tokens is {sampling.max_tokens}",
            )
        return Request(
            request_id=convert.request_id(request.request_id),
            prompt_token_ids=await self._input_ids(request),
            sampling=sampling,
            priority=convert.priority(request.priority),
            resume_token_ids=resumed,
            deadline_s=_deadline(context),
        )

    async def _events(self, request: Request) -> AsyncIterator[TokenEvent]:
        """The events of a request; leaving early cancels it.

        Raises:
            CancelledError, DeadlineError, UnavailableError: it ended so.
        """
        started_s = time.monotonic()
        events = self._engine.submit(request)
        try:
            async for event in events:
                if event.finish_reason is not None:
                    self._metrics.count_finished(
                        event.finish_reason, e2e_s=time.monotonic() - started_s
                    )
                _raise_failure(event)
                yield event
        finally:
            events.cancel()

    async def _generate(
        self, wire: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[Generated]:
        """Chunks of one call. The first token travels alone; those that have gathered since travel
        together."""
        request = await self._to_request(wire, context)
        sampling = request.sampling
        progress = _Progress(
            request=request,
            texts=[
                TextStream(self._tokenizer, stops=sampling.stop, resumed=request.resume_token_ids)
                for _ in range(sampling.n)
            ],
            last_token_s=[None] * sampling.n,
            ended=[False] * sampling.n,
        )
        events = self._engine.submit(request)
        try:
            while not all(progress.ended):
                chunks = self._chunks(progress, events, await _gather(events))
                if all(progress.ended):
                    chunks[-1].usage.CopyFrom(progress.usage())
                for chunk in chunks:
                    yield chunk
        finally:
            events.cancel()

    def _chunks(
        self, progress: _Progress, events: RequestStream, batch: list[TokenEvent]
    ) -> list[Generated]:
        """One chunk per sequence that has news; the last one to end comes last."""
        chunks: dict[int, Generated] = {}
        for event in batch:
            if progress.ended[event.index]:
                continue  # tokens behind a stop string
            chunk = chunks.get(event.index)
            if chunk is None:
                chunk = chunks[event.index] = Generated(
                    request_id=event.request_id, index=event.index, token_offset=event.token_offset
                )
            self._add(progress, events, event, chunk)
        return sorted(chunks.values(), key=lambda chunk: chunk.finish_reason != 0)

    def _add(
        self, progress: _Progress, events: RequestStream, event: TokenEvent, chunk: Generated
    ) -> None:
        """Add one event to its sequence's chunk."""
        text, reason = progress.texts[event.index], event.finish_reason
        progress.cached_tokens = max(progress.cached_tokens, event.num_cached_tokens)
        if event.token_id is not None:
            self._time(progress, event.index)
            progress.completion_tokens += 1
            chunk.token_ids.append(event.token_id)
            if progress.request.sampling.logprobs is not None:
                chunk.logprobs.append(convert.position_logprobs(event))
            chunk.text += text.push(event.token_id)
        if text.found_stop and reason is None:
            events.finish(event.index, FinishReason.STOP_SEQUENCE)
        _raise_failure(event)
        if reason is not None:
            chunk.text += text.finish()
        if text.found_stop:
            reason = FinishReason.STOP_SEQUENCE
        if reason is not None:
            progress.ended[event.index] = True
            chunk.finish_reason = convert.FINISH_REASONS[reason]
            self._metrics.count_finished(reason, e2e_s=time.monotonic() - progress.started_s)

    def _time(self, progress: _Progress, index: int) -> None:
        now_s = time.monotonic()
        before = progress.last_token_s[index]
        if before is None:
            self._metrics.observe_first_token(now_s - progress.started_s)
        else:
            self._metrics.observe_inter_token(now_s - before)
        progress.last_token_s[index] = now_s


async def _gather(events: RequestStream) -> list[TokenEvent]:
    """The next event and all that wait behind it."""
    batch = [await anext(events)]
    while events.has_waiting:
        batch.append(await anext(events))
    return batch


def _deadline(context: Context) -> float | None:
    """The call's deadline on the scheduler's clock; None: it has none."""
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s

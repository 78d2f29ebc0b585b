"""InferenceService: prompts in, tokens out."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

from tightfit.cluster.engine import Engine
from tightfit.cluster.errors import TightfitError
from tightfit.cluster.gateway import convert
from tightfit.cluster.gateway.generation import Chunk, Generation, joined, raise_failure
from tightfit.cluster.gateway.leaving import Leaving
from tightfit.cluster.gateway.prompts import Prompts
from tightfit.cluster.gateway.status import Context, stream, unary
from tightfit.cluster.gateway.watch import RequestWatch, Tracer
from tightfit.cluster.metrics import Metrics
from tightfit.cluster.request import FinishReason, Request
from tightfit.cluster.request_stream import RequestStream
from tightfit.cluster.security.caller import charge
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.v1 import inference_pb2, inference_pb2_grpc


class InferenceService(inference_pb2_grpc.InferenceServiceServicer):
    """See protos/tightfit/v1/inference.proto.

    Args:
        engine: started, in this event loop.
        tokenizer: the model's.
        metrics: where to count.
        tracer: where traces of requests go; None: nowhere.
    Raises:
        ConfigError: the checkpoint's chat template is not valid.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: Metrics,
        tracer: Tracer | None = None,
    ) -> None:
        self._engine, self._metrics, self._tracer = engine, metrics, tracer
        self._prompts = Prompts(tokenizer, engine.model_info)

    def close(self) -> None:
        """End what the service started."""
        self._prompts.close()

    # -- methods -----------------------------------------------------------------------------

    async def Generate(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> inference_pb2.GenerateResponse:
        """One answer, when every sequence has ended."""

        async def work() -> inference_pb2.GenerateResponse:
            return joined([c async for c in self._generate("Generate", request, context)])

        return await unary(context, work)

    async def GenerateStream(
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[Chunk]:
        """Chunks as tokens come."""
        chunks = self._generate("GenerateStream", request, context)
        async for chunk in stream(context, chunks):
            yield chunk

    async def Score(
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        """Log-probabilities of a given text."""

        async def work() -> inference_pb2.ScoreResponse:
            leaving = Leaving(context)
            watch = self._watch("Score", context)
            whole = await self._checked(watch, self._prompts.score_request(request, context))
            events = self._submit(watch, whole)
            context.add_done_callback(_canceller(events, leaving))  # type: ignore[arg-type]
            reason: FinishReason | None = None
            try:
                event = await anext(events)
                watch.heard(event)
                reason = event.finish_reason
                raise_failure(event)
                return inference_pb2.ScoreResponse(
                    request_id=whole.request_id,
                    token_ids=whole.prompt_token_ids,
                    logprobs=event.scores,
                )
            finally:
                watch.ended(reason or leaving.reason, events)

        return await unary(context, work)

    async def Tokenize(
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        """Text to token ids."""

        async def work() -> inference_pb2.TokenizeResponse:
            convert.check_model(request.model, self._engine.model_info)
            ids = await self._prompts.token_ids(request)
            return inference_pb2.TokenizeResponse(token_ids=ids)

        return await unary(context, work)

    async def Detokenize(
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text."""

        async def work() -> inference_pb2.DetokenizeResponse:
            convert.check_model(request.model, self._engine.model_info)
            text = await self._prompts.decode(request.token_ids)
            return inference_pb2.DetokenizeResponse(text=text)

        return await unary(context, work)

    async def GetModel(
        self, request: inference_pb2.GetModelRequest, context: Context
    ) -> inference_pb2.GetModelResponse:
        """What is served."""
        return convert.model_response(
            self._engine.model_info, has_chat_template=self._prompts.has_chat_template
        )

    # -- inside ------------------------------------------------------------------------------

    async def _generate(
        self, method: str, wire: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncGenerator[Chunk, None]:
        """Chunks of one call; the end of the call ends the request."""
        leaving = Leaving(context)
        watch = self._watch(method, context)
        request = await self._checked(watch, self._prompts.generate_request(wire, context))
        generation = Generation(request, await self._prompts.texts(request), watch)
        whole = generation.resumed_at_its_end()
        if whole is not None:
            yield whole
            return
        events = self._submit(watch, request)
        # Not when this generator is closed: it may wait long behind a client that stopped reading.
        context.add_done_callback(_canceller(events, leaving))  # type: ignore[arg-type]
        try:
            async for chunk in generation.chunks(events):
                charge(len(chunk.token_ids))
                yield chunk
        finally:
            watch.ended(generation.reason or leaving.reason, events)

    def _watch(self, method: str, context: Context) -> RequestWatch:
        metadata = context.invocation_metadata() or ()
        return RequestWatch(self._metrics, self._tracer, method, metadata)

    async def _checked(self, watch: RequestWatch, making: Awaitable[Request]) -> Request:
        try:
            return await making
        except TightfitError as error:
            watch.refused(error.status)
            raise

    def _submit(self, watch: RequestWatch, request: Request) -> RequestStream:
        watch.queued(request)
        try:
            stream = self._engine.submit(request)
        except TightfitError as error:
            watch.refused(error.status)
            raise
        charge(len(request.prompt_token_ids) + len(request.resume_token_ids))
        return stream


def _canceller(events: RequestStream, leaving: Leaving) -> Callable[[Context], None]:
    """Ends a request when its call is over, if it has not ended by itself."""

    def cancel(_: Context) -> None:
        events.cancel(leaving.reason)

    return cancel

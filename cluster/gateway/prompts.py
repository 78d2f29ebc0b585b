"""From a request on the wire to one that the engine takes: checked, and its prompt as tokens."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tightfit.cluster.chat import ChatTemplate
from tightfit.cluster.deployment_status import ModelInfo
from tightfit.cluster.errors import InvalidRequestError
from tightfit.cluster.gateway import convert
from tightfit.cluster.gateway.status import Context
from tightfit.cluster.request import Request, SamplingParams
from tightfit.cluster.text_stream import TextStream, decode_whole
from tightfit.cluster.tokenizer import Tokenizer
from tightfit.v1 import common_pb2, inference_pb2
from tightfit.workers.logs import log_context

NUM_THREADS = 2
"""A text of 4 MiB takes seconds to encode; it may hold up one thread, not the other."""

T = TypeVar("T")
Wire = inference_pb2.GenerateRequest | inference_pb2.ScoreRequest | inference_pb2.TokenizeRequest


class Prompts:
    """Reads prompts; encoding and rendering run in threads of its own, off the event loop.

    Args:
        tokenizer: the model's.
        model: what is served.
    Raises:
        ConfigError: the checkpoint's chat template is not valid.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self._tokenizer, self._model = tokenizer, model
        template = tokenizer.chat_template
        self._chat = ChatTemplate(template, tokenizer.special_tokens) if template else None
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="prompts")

    @property
    def has_chat_template(self) -> bool:
        """Conversations can be prompts."""
        return self._chat is not None

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _off_loop(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def token_ids(self, wire: Wire) -> tuple[int, ...]:
        """Tokens of whichever input the request has.

        Raises:
            InvalidRequestError: it has none, it is empty, or this checkpoint cannot read it.
        """
        kind = wire.WhichOneof("input")
        if kind is None:
            fields = [field.name for field in wire.DESCRIPTOR.oneofs_by_name["input"].fields]
            raise InvalidRequestError(fields[0], f"is missing; set one of {', '.join(fields)}")
        if kind == "token_ids":
            ids: common_pb2.TokenIds = wire.token_ids  # type: ignore[union-attr]
            if not ids.ids:
                raise InvalidRequestError("token_ids", "is empty; give at least one token id")
            return convert.token_ids("token_ids.ids", ids.ids, self._model)
        if kind == "chat":
            return await self._chat_ids(wire.chat)  # type: ignore[union-attr]
        if not wire.prompt:
            raise InvalidRequestError("prompt", "is empty; give at least one character")
        text = wire.prompt
        return tuple(await self._off_loop(lambda: self._tokenizer.encode(text)))

    async def _chat_ids(self, chat: common_pb2.Chat) -> tuple[int, ...]:
        template = self._chat
        if template is None:
            raise InvalidRequestError(
                "chat", "this checkpoint has no chat template; send prompt or token_ids"
            )
        messages = convert.messages(chat)

        def render_and_encode() -> list[int]:
            # Templates write the special tokens themselves.
            return self._tokenizer.encode(template.render(messages), add_special_tokens=False)

        return tuple(await self._off_loop(render_and_encode))

    async def _bounded_ids(self, wire: Wire, longest: int) -> tuple[int, ...]:
        field = wire.WhichOneof("input") or "prompt"
        if field == "token_ids":  # their number is known without a look at each
            self._check_length(field, len(wire.token_ids.ids), longest)  # type: ignore[union-attr]
        ids = await self.token_ids(wire)
        if not ids:
            raise InvalidRequestError(field, "is empty once tokenised; give at least one token")
        self._check_length(field, len(ids), longest)
        return ids

    def _check_length(self, field: str, length: int, longest: int) -> None:
        if length > longest:
            raise InvalidRequestError(
                field,
                f"has {length} tokens; the longest that fits the context of "
                f"{self._model.max_context_tokens} tokens is {longest}",
            )

    async def generate_request(
        self, wire: inference_pb2.GenerateRequest, context: Context
    ) -> Request:
        """What to generate.

        Raises:
            InvalidRequestError, ModelNotFoundError: see their messages.
        """
        model = self._model
        convert.check_model(wire.model, model)
        request_id = convert.request_id(wire.request_id)
        log_context(request_id=request_id)
        priority = convert.priority(wire.priority)
        sampling = convert.sampling_params(wire.sampling, model)
        resumed = convert.resumed(wire.resume_token_ids, sampling, model)
        return Request(
            request_id=request_id,
            prompt_token_ids=await self._bounded_ids(wire, model.max_context_tokens - 1),
            sampling=sampling,
            priority=priority,
            resume_token_ids=resumed,
            deadline_s=_deadline(context),
        )

    async def score_request(self, wire: inference_pb2.ScoreRequest, context: Context) -> Request:
        """What to score.

        Raises:
            InvalidRequestError, ModelNotFoundError: see their messages.
        """
        convert.check_model(wire.model, self._model)
        request_id = convert.request_id(wire.request_id)
        log_context(request_id=request_id)
        priority = convert.priority(wire.priority)
        return Request(
            request_id=request_id,
            prompt_token_ids=await self._bounded_ids(wire, self._model.max_context_tokens),
            sampling=SamplingParams(max_tokens=0),
            priority=priority,
            deadline_s=_deadline(context),
            score_only=True,
        )

    async def texts(self, request: Request) -> list[TextStream]:
        """One text per sequence, which knows of what was resumed."""
        stops, resumed = request.sampling.stop, request.resume_token_ids

        def make() -> list[TextStream]:
            return [
                TextStream(self._tokenizer, stops=stops, resumed=resumed)
                for _ in range(request.sampling.n)
            ]

        return await self._off_loop(make) if resumed else make()

    async def decode(self, token_ids: Iterable[int]) -> str:
        """Text of tokens, as a stream of them would show it.

        Raises:
            InvalidRequestError: one is not in the vocabulary.
        """

        def check_and_decode() -> str:
            known = convert.token_ids("token_ids", token_ids, self._model)
            return decode_whole(self._tokenizer, known)

        return await self._off_loop(check_and_decode)


def _deadline(context: Context) -> float | None:
    """The call's deadline on the scheduler's clock; None: it has none."""
    left_s = context.time_remaining()
    return None if left_s is None else time.monotonic() + left_s

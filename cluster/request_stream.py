"""A request's events on their way from the engine's thread to whoever waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from tightfit.cluster.request import FinishReason, Loss, Recovery, Request, StepTiming, TokenEvent


class Ends(Protocol):
    """The engine, as far as a stream needs it."""

    def cancel(self, stream: RequestStream, reason: FinishReason) -> None:
        """End a request; does nothing when it has ended."""

    def finish(self, stream: RequestStream, index: int, reason: FinishReason) -> None:
        """End one sequence of a request; does nothing when it has ended."""


class RequestStream:
    """The events of one request, in order; made by `Engine.submit`, read in the event loop."""

    def __init__(self, engine: Ends, request: Request) -> None:
        self._engine = engine
        self._request = request
        self._events: asyncio.Queue[TokenEvent] = asyncio.Queue()
        self._unfinished = request.sampling.n
        self._num_open = request.sampling.n
        self.steps: list[StepTiming] = []
        """Its first steps through the stages, if the engine was told to note any."""
        self.recoveries: list[Recovery] = []
        """Of the pipeline, while the request was under way."""
        self.loss: Loss | None = None
        """Of the pipeline, from which it has not come back."""

    @property
    def request_id(self) -> str:
        """Identity of the request."""
        return self._request.request_id

    def push(self, event: TokenEvent) -> None:
        """Add an event; in the event loop only."""
        self._events.put_nowait(event)
        if event.finish_reason is not None:
            self._num_open -= 1

    @property
    def has_every_end(self) -> bool:
        """The last event of each sequence was pushed, though maybe not read."""
        return self._num_open == 0

    @property
    def has_waiting(self) -> bool:
        """An event can be taken at once."""
        return not self._events.empty()

    def __aiter__(self) -> AsyncIterator[TokenEvent]:
        return self

    async def __anext__(self) -> TokenEvent:
        if self._unfinished == 0:
            raise StopAsyncIteration
        event = await self._events.get()
        if event.finish_reason is not None:
            self._unfinished -= 1
        return event

    def cancel(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End every sequence of the request; its KV blocks are free when this returns.

        Does nothing when the request has ended, even if its id is another's by now.
        """
        self._engine.cancel(self, reason)

    def finish(self, index: int, reason: FinishReason) -> None:
        """End one of the request's sequences, as when a stop string was found."""
        self._engine.finish(self, index, reason)

"""From the events of one request to the chunks of its answer."""

from __future__ import annotations

from collections.abc import AsyncIterator

from tightfit.cluster.errors import CancelledError, DeadlineError, UnavailableError
from tightfit.cluster.gateway import convert
from tightfit.cluster.gateway.watch import RequestWatch
from tightfit.cluster.request import FinishReason, Request, TokenEvent
from tightfit.cluster.request_stream import RequestStream
from tightfit.cluster.text_stream import TextStream
from tightfit.v1 import common_pb2, inference_pb2

Chunk = inference_pb2.GenerateStreamResponse

MAX_GATHERED = 256
"""Events in one chunk; with all log-probabilities such a chunk is under 100 KB."""


def raise_failure(event: TokenEvent) -> None:
    """Raise what an event that is no proper end stands for.

    Raises:
        CancelledError, DeadlineError, UnavailableError: the request ended so.
    """
    if event.finish_reason is FinishReason.ERROR:
        raise UnavailableError(event.error)
    if event.finish_reason is FinishReason.CANCELLED:
        raise CancelledError("the request was cancelled")
    if event.finish_reason is FinishReason.DEADLINE:
        raise DeadlineError("the deadline passed before the request had ended")


class _Sequence:
    """One of the request's n sequences, as far as it was heard of."""

    def __init__(self, text: TextStream) -> None:
        self.text = text
        self.has_ended = False


class Generation:
    """One request's answer under way.

    Args:
        request: as it was submitted.
        texts: one per sequence.
        watch: is told of every event.
    """

    def __init__(self, request: Request, texts: list[TextStream], watch: RequestWatch) -> None:
        self._request, self._watch = request, watch
        self._sequences = [_Sequence(text) for text in texts]
        self._num_ended = 0
        self.reason: FinishReason | None = None
        """Why the last sequence ended, once all have, or why the request failed."""

    @property
    def has_ended(self) -> bool:
        """Every sequence has."""
        return self._num_ended == len(self._sequences)

    async def chunks(self, events: RequestStream) -> AsyncIterator[Chunk]:
        """Chunks in order. The first token of the request travels alone; later ones that have
        gathered meanwhile travel together.

        Raises:
            CancelledError, DeadlineError, UnavailableError: the request ended so.
        """
        while not self.has_ended:
            batch = [await anext(events)]
            if self._watch.num_generated_tokens:
                while events.has_waiting and len(batch) < MAX_GATHERED:
                    batch.append(await anext(events))
            for chunk in self._chunks_of(batch, events):
                yield chunk

    def resumed_at_its_end(self) -> Chunk | None:
        """The whole answer, if what was resumed ends with a stop string already."""
        if not self._sequences[0].text.found_stop:
            return None
        chunk = Chunk(
            request_id=self._request.request_id, token_offset=len(self._request.resume_token_ids)
        )
        self._end(self._sequences[0], chunk, FinishReason.STOP_SEQUENCE)
        return chunk

    def _chunks_of(self, batch: list[TokenEvent], events: RequestStream) -> list[Chunk]:
        """One chunk per sequence that has news; those of sequences that ended come last."""
        chunks: dict[int, Chunk] = {}
        for event in batch:
            if self._sequences[event.index].has_ended:
                continue  # tokens behind a stop string
            chunk = chunks.get(event.index)
            if chunk is None:
                chunk = chunks[event.index] = Chunk(
                    request_id=event.request_id, index=event.index, token_offset=event.token_offset
                )
            self._add(event, chunk, events)
        return sorted(chunks.values(), key=lambda chunk: chunk.HasField("usage"))

    def _add(self, event: TokenEvent, chunk: Chunk, events: RequestStream) -> None:
        """Add one event to its sequence's chunk."""
        sequence, reason = self._sequences[event.index], event.finish_reason
        self._watch.heard(event)
        if event.token_id is not None:
            chunk.token_ids.append(event.token_id)
            if self._request.sampling.logprobs is not None:
                chunk.logprobs.append(convert.position_logprobs(event))
            if reason is not FinishReason.STOP:  # the token that ended it is no text
                chunk.text += sequence.text.push(event.token_id)
        if sequence.text.found_stop and reason is None:
            events.finish(event.index, FinishReason.STOP_SEQUENCE)
            reason = FinishReason.STOP_SEQUENCE
        if reason in (FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.ERROR):
            self.reason = reason
            raise_failure(event)
        if reason is not None:
            self._end(sequence, chunk, reason)

    def _end(self, sequence: _Sequence, chunk: Chunk, reason: FinishReason) -> None:
        """Complete the last chunk of a sequence."""
        chunk.text += sequence.text.finish()
        if sequence.text.found_stop:
            reason = FinishReason.STOP_SEQUENCE
        chunk.finish_reason = convert.FINISH_REASONS[reason]
        sequence.has_ended = True
        self._num_ended += 1
        if self.has_ended:
            self.reason = reason
            chunk.usage.CopyFrom(self._usage())

    def _usage(self) -> common_pb2.Usage:
        return common_pb2.Usage(
            prompt_tokens=len(self._request.prompt_token_ids),
            completion_tokens=self._watch.num_generated_tokens,
            cached_tokens=self._watch.num_cached_tokens,
        )


def joined(chunks: list[Chunk]) -> inference_pb2.GenerateResponse:
    """All chunks of a call as one answer."""
    outputs: dict[int, inference_pb2.Output] = {}
    texts: dict[int, list[str]] = {}
    for chunk in chunks:
        output = outputs.setdefault(chunk.index, inference_pb2.Output(index=chunk.index))
        texts.setdefault(chunk.index, []).append(chunk.text)
        output.token_ids.extend(chunk.token_ids)
        output.logprobs.extend(chunk.logprobs)
        output.finish_reason = chunk.finish_reason
    for index, output in outputs.items():
        output.text = "".join(texts[index])
    return inference_pb2.GenerateResponse(
        request_id=chunks[-1].request_id,
        outputs=[outputs[index] for index in sorted(outputs)],
        usage=chunks[-1].usage,
    )

"""Decode steps as captured CUDA graphs. T tokens, one of each sequence.

A decode step of a large model is some hundred short kernels for each layer's milliseconds of memory
traffic: launched one by one from Python, the GPU waits for the host. A graph launches them at once,
but with the shapes it was captured with. So there is one for each number of tokens out of
`GRAPH_SIZES` and each longest context, powers of two; a micro-batch takes the smallest that holds
it, and what is left over is padding, which stores nothing and whose rows are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.attention_plan import AttentionPlan, FixedSizes
from tightfit.workers.api import MicroBatch
from tightfit.workers.batch import BatchBuilder, BatchInputs
from tightfit.workers.workspace import FIRST_CONTEXT, GRAPH_SIZES

NO_SLOT: Final = -1
"""Where padding's keys and values go: nowhere."""

Layers = Callable[[Tensor, BatchInputs], Tensor]
"""A shard's layers: hidden states [T, hidden size] in, the same out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Captured:
    """A graph with what it reads and writes."""

    graph: torch.cuda.CUDAGraph
    hidden: Tensor
    """[T, hidden size], in."""
    places: Tensor
    """[2, T] int64, in: positions and slots."""
    plan: AttentionPlan
    out: Tensor
    """[T, hidden size]."""


class DecodeGraphs:
    """A shard's graphs.

    Args:
        layers: what is captured.
        builder: of the shard.
        hidden_size, dtype: of hidden states.
        max_position: of the model.
        max_tokens: most tokens of a micro-batch.
        device: torch device name.
    """

    def __init__(
        self,
        layers: Layers,
        builder: BatchBuilder,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        max_position: int,
        max_tokens: int,
        device: str,
    ) -> None:
        self._layers, self._builder = layers, builder
        self._hidden_size, self._dtype, self._device = hidden_size, dtype, device
        self._max_position = max_position
        self._sizes = [size for size in GRAPH_SIZES if size <= max_tokens]
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[tuple[int, int], _Captured] = {}

    def capture(self) -> None:
        """Capture those that most steps want. Large ones first: the others fit their memory."""
        for size in reversed(self._sizes):
            self._get(size, self._context(1))

    def takes(self, batch: MicroBatch) -> bool:
        """Whether the micro-batch is decodes only, and no more of them than there is a graph
        for."""
        return len(batch.slices) <= self._sizes[-1] and all(
            len(part.token_ids) == 1 for part in batch.slices
        )

    def __call__(self, batch: MicroBatch, hidden: Tensor, places: Tensor) -> Tensor:
        """Compute a micro-batch that `takes` says yes to.

        Args:
            batch: T decodes.
            hidden: [T, hidden size].
            places: [2, T] int64, positions and slots.
        Returns:
            [T, hidden size]; valid until the next call.
        """
        num_tokens = len(batch.slices)
        size = next(size for size in self._sizes if size >= num_tokens)
        longest = max(part.start_position for part in batch.slices) + 1
        captured = self._get(size, self._context(longest))
        captured.hidden[:num_tokens] = hidden
        captured.places[0].zero_()
        captured.places[1].fill_(NO_SLOT)
        captured.places[:, :num_tokens] = places
        fixed = FixedSizes(num_tokens=size, max_context=captured.plan.max_context)
        captured.plan.refill(self._builder.plan(batch.slices, fixed))
        captured.graph.replay()
        return captured.out[:num_tokens]

    def _context(self, longest: int) -> int:
        context = FIRST_CONTEXT
        while context < longest:
            context *= 2
        return max(min(context, self._max_position), longest)

    def _get(self, size: int, context: int) -> _Captured:
        key = (size, context)
        if key not in self._captured:
            self._captured[key] = self._capture(size, context)
        return self._captured[key]

    def _capture(self, size: int, context: int) -> _Captured:
        hidden = torch.zeros((size, self._hidden_size), dtype=self._dtype, device=self._device)
        places = torch.zeros((2, size), dtype=torch.int64, device=self._device)
        places[1] = NO_SLOT
        plan = self._builder.plan([], FixedSizes(num_tokens=size, max_context=context))

        def run() -> Tensor:
            cos, sin = self._builder.rotary(places[0])
            inputs = BatchInputs(
                token_ids=places[0], positions=places[0], slots=places[1], cos=cos, sin=sin,
                plan=plan,
            )  # fmt: skip
            return self._layers(hidden.clone(), inputs)

        stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run()  # compiles and loads kernels, which cannot be captured
        torch.cuda.current_stream(self._device).wait_stream(stream)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = run()
        return _Captured(graph=graph, hidden=hidden, places=places, plan=plan, out=out)

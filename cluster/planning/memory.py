"""Which layers go on which stage, by all the bytes that a stage needs: weights, KV, workspace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.split import split_layers
from tightfit.cluster.units import format_bytes
from tightfit.kernels.formats import Format
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import ModelFormats
from tightfit.workers.shard_bytes import (
    gpu_reserve_bytes,
    head_bytes,
    head_format_bytes,
    kv_block_bytes,
    layer_format_bytes,
    model_bytes,
    shard_bytes,
)
from tightfit.workers.workspace import workspace_bytes

DEVICE_CONTEXT_BYTES = 512 * 2**20
"""Of a CUDA context with our kernels loaded: what a GPU that nobody uses has less than its total,
once a stage has begun."""
SAFE_RESERVE_BYTES = 1930 * 2**20 - DEVICE_CONTEXT_BYTES
SAFE_RESERVE_SHARE = 20


class Reserve(StrEnum):
    """How much of a GPU's free memory stays unplanned. What is left of T bytes when nobody else
    uses the GPU is given for each; the workspace of the largest micro-batch comes on top."""

    TIGHT = "tight"
    """What a stage itself leaves: 0.98 T − 1 GiB."""
    SAFE = "safe"
    """As planners do that count no workspace: 0.95 T − 1,930 MiB."""


def usable_bytes(free: int, total: int, reserve: Reserve, *, is_gpu: bool) -> int:
    """What of a device's free bytes a plan may fill with weights, KV cache and workspace.

    A share of a host is what its operator declares, and all of it may be filled.
    """
    if not is_gpu:
        return free
    if reserve is Reserve.SAFE:
        return max(0, free - SAFE_RESERVE_BYTES - total // SAFE_RESERVE_SHARE)
    return max(0, free - gpu_reserve_bytes(total))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBytes:
    """What one stage is predicted to need."""

    weights: int
    """Weights with scales and biases; embedding and LM head where the stage holds them."""
    kv_cache: int
    """KV blocks, all layers of the stage."""
    workspace: int
    """Activations, logits and scratch of the largest micro-batch."""

    @property
    def total(self) -> int:
        """What counts against the stage's budget."""
        return self.weights + self.kv_cache + self.workspace


def stage_bytes(
    model: DecoderConfig,
    formats: ModelFormats,
    first_layer: int,
    end_layer: int,
    *,
    kv_blocks: int,
    block_size: int,
    max_batch_tokens: int,
) -> StageBytes:
    """Bytes of the stage that holds layers [first_layer, end_layer)."""
    return StageBytes(
        weights=shard_bytes(
            model,
            formats,
            first_layer,
            end_layer,
            has_embedding=first_layer == 0,
            has_head=end_layer == model.num_layers,
        ),
        kv_cache=kv_blocks * kv_block_bytes(model, formats, end_layer - first_layer, block_size),
        workspace=workspace_bytes(model, formats, max_batch_tokens),
    )


class Reads(NamedTuple):
    """What a step reads of a part's weights."""

    linears: tuple[tuple[str, int], ...]
    """(Format, bytes) of its linear layers, by format."""
    other: int
    """Bytes of norms."""

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.other + sum(size for _, size in self.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a model's parts take, each in its format: what the planner lays over devices."""

    layers: tuple[int, ...]
    """Weights of each layer, in the lesser of two formats if there are two."""
    kinds: tuple[Reads, ...]
    """The same by formats: layers that are alike are one kind."""
    kind: tuple[int, ...]
    """Of each layer, its index."""
    better_kinds: tuple[Reads, ...] = ()
    """The kinds in the better format, where there are two."""
    head_reads: Reads
    """Of the head."""
    step: int = 0
    """What any layer takes more in the better format; 0: there is one format."""
    embedding: int
    """On the first stage, besides its layers."""
    head: int
    """On the last."""
    lone_head: int
    """The same where one stage holds everything, and the head's tensor is the embedding's."""
    kv_block: int
    """One KV block of one layer."""
    workspace: int
    """On every stage, in either format."""

    def is_no_larger_than(self, other: Parts) -> bool:
        """Nothing takes more than there."""
        names = ("step", "embedding", "head", "lone_head", "kv_block", "workspace")
        pairs = [(getattr(self, name), getattr(other, name)) for name in names]
        return all(
            mine <= theirs
            for mine, theirs in [*pairs, *zip(self.layers, other.layers, strict=True)]
        )


def model_parts(
    model: DecoderConfig,
    formats: ModelFormats,
    better: ModelFormats | None = None,
    *,
    block_size: int,
    max_batch_tokens: int,
) -> Parts:
    """Bytes of a model's parts, by the formulas that a stage checks itself against.

    Args:
        model: the decoder.
        formats: of its parts.
        better: the same with layers in a format of more bits, which some layers may have.
        block_size: tokens in a KV block.
        max_batch_tokens: most tokens in a micro-batch.

    Raises:
        PlacementError: the better format costs more in one layer than in another.
    """
    weights = model_bytes(model, formats)
    ends = model_bytes(model, better or formats)  # projections beside the blocks, where there are
    steps = {more - less for more, less in zip(ends.layers, weights.layers, strict=True)}
    if len(steps) > 1:
        raise PlacementError(
            "formats are mixed layer by layer only where all layers are alike, and some of this "
            "checkpoint's are quantised already: allow one format, or auto"
        )
    kinds, kind = _kinds(model, formats, weights.layers)
    return Parts(
        layers=weights.layers,
        kinds=kinds,
        kind=kind,
        better_kinds=_kinds(model, better, ends.layers)[0] if better else (),
        head_reads=_reads(head_format_bytes(model, better or formats), ends.head),
        step=steps.pop(),
        embedding=ends.embedding,
        head=ends.head,
        lone_head=head_bytes(model, better or formats, shared=ends.head_shared),
        kv_block=kv_block_bytes(model, formats, 1, block_size),
        workspace=max(
            workspace_bytes(model, some, max_batch_tokens) for some in (formats, better or formats)
        ),
    )


def _kinds(
    model: DecoderConfig, formats: ModelFormats, layers: tuple[int, ...]
) -> tuple[tuple[Reads, ...], tuple[int, ...]]:
    """What the kinds of layers read, and each layer's kind."""
    reads = [_reads(layer_format_bytes(model, formats, i), total) for i, total in enumerate(layers)]
    kinds = {one: number for number, one in enumerate(dict.fromkeys(reads))}
    return tuple(kinds), tuple(kinds[one] for one in reads)


def _reads(linears: Mapping[Format, int], total: int) -> Reads:
    return Reads(tuple(sorted(linears.items())), total - sum(linears.values()))


def plan_stages(
    model: DecoderConfig,
    formats: ModelFormats,
    *,
    num_stages: int,
    budget_bytes: int | None = None,
    kv_blocks: int | None = None,
    block_size: int = 16,
    max_batch_tokens: int = 512,
    balance: str = "memory",
) -> list[tuple[int, int]]:
    """Contiguous layers for each stage so that the fullest stage has least to hold, or to read.

    Args:
        model: the decoder.
        formats: of its parts.
        num_stages: how many stages.
        budget_bytes: most bytes on each stage for weights, KV cache and workspace; None: no limit.
        kv_blocks: KV blocks on every stage; None: one is counted, the stage takes what is left.
        block_size: tokens in a KV block.
        max_batch_tokens: most tokens in a micro-batch.
        balance: "memory" counts all that a stage holds; "speed" only the weights that a step reads,
            which decide its time: all but the embedding, of which a step reads some rows.

    Returns:
        One (first layer, one past the last) per stage.

    Raises:
        PlacementError: more stages than layers, or the model does not fit the budget.
    """
    weights = model_bytes(model, formats)
    kv_per_layer = (kv_blocks or 1) * kv_block_bytes(model, formats, 1, block_size)
    head = weights.head
    if num_stages == 1 and weights.head_shared:
        head = head_bytes(model, formats, shared=True)
    layers = [layer + kv_per_layer for layer in weights.layers]
    budgets = _budgets(model, formats, num_stages, budget_bytes, max_batch_tokens)
    if balance == "memory":
        return split_layers(layers, weights.embedding, head, num_stages, budgets)
    ranges = split_layers(list(weights.layers), 0, weights.head, num_stages)
    for index, (first, end) in enumerate(ranges):
        needed = sum(layers[first:end])
        needed += weights.embedding if index == 0 else 0
        needed += head if index == num_stages - 1 else 0
        if budgets is not None and needed > budgets[index]:
            raise PlacementError(
                f"balanced by speed, stage {index} (layers {first}-{end - 1}) needs "
                f"{format_bytes(needed)} for weights and KV, and its budget leaves "
                f"{format_bytes(budgets[index])}. Balance by memory, or raise memory_budget"
            )
    return ranges


def _budgets(
    model: DecoderConfig,
    formats: ModelFormats,
    num_stages: int,
    budget_bytes: int | None,
    max_batch_tokens: int,
) -> list[int] | None:
    """What each stage has left for weights and KV; every stage needs the same workspace."""
    if budget_bytes is None:
        return None
    workspace = workspace_bytes(model, formats, max_batch_tokens)
    if workspace >= budget_bytes:
        raise PlacementError(
            f"micro-batches of {max_batch_tokens} tokens need {format_bytes(workspace)} of "
            f"workspace on every stage, but its budget is {format_bytes(budget_bytes)}. Lower "
            "max_batch_tokens or raise memory_budget"
        )
    return [budget_bytes - workspace] * num_stages

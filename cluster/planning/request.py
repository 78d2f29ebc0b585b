"""What a plan is asked for, and the formats and levels of quality that come into question."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from itertools import pairwise, product

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.inventory import Inventory
from tightfit.cluster.planning.memory import Parts, model_parts
from tightfit.cluster.planning.pools import Objective
from tightfit.kernels.formats import Format
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import AUTO, ModelFormats, Role, Scheme, model_formats
from tightfit.workers.sensitivity import FormatMix
from tightfit.workers.shard_bytes import bits_per_weight, layer_bytes

ROOM_GRAIN_BYTES = 2**24
"""What a device has is planned with in whole grains, so that alike devices are of one class where
their free bytes differ a little."""


class Spare(StrEnum):
    """What memory is for that the workload leaves."""

    KV = "kv"
    """Tokens; quality is then what was asked for at least, and no more."""
    QUALITY = "quality"
    """Layers in better formats, then tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that a plan depends on."""

    model: DecoderConfig
    inventory: Inventory
    sequences: int = 1
    """That are to have KV blocks at the same time."""
    context: int = 2048
    """Tokens of each, prompt and output together."""
    formats: tuple[str, ...] = (Format.INT4, Format.INT8)
    """For layers; or "auto" alone: as a quantised checkpoint has them."""
    is_mixed: bool = False
    """Some layers may be in one format, the others in the next."""
    mix: FormatMix | None = None
    """Of the blocks' linear layers, each one's format; then `formats` counts for nothing."""
    head_format: str = AUTO
    kv_formats: tuple[str, ...] = (AUTO, "int8")
    embedding_places: tuple[str, ...] = ("host", "device")
    min_bits: float = 0.0
    """Mean of the layers' weights, at least; scales and zero points count."""
    spare: Spare = Spare.KV
    objective: Objective = Objective.DEVICES
    max_devices: int | None = None
    max_dollars: float | None = None
    """An hour."""
    exclude: frozenset[str] = frozenset()
    """Ids of devices, nodes or types that are not used."""
    same_node: bool = False
    """All devices are on one node."""
    pins: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Device id → (first layer, one past the last) that it holds, neither more nor less."""
    block_size: int = 16
    max_batch_tokens: int = 512
    room_grain_bytes: int = ROOM_GRAIN_BYTES

    def __post_init__(self) -> None:
        """Raises PlacementError on what no device could change."""
        if self.context > self.model.max_position:
            raise PlacementError(
                f"a context of {self.context:,} tokens is more than the model's "
                f"{self.model.max_position:,}"
            )
        if not self.formats or not self.kv_formats or not self.embedding_places:
            raise PlacementError("no format is allowed for layers, KV cache or embedding")
        if AUTO in self.formats and len(self.formats) > 1:
            raise PlacementError("auto stands for what the checkpoint has: it goes with no other")

    @property
    def needed_blocks(self) -> int:
        """KV blocks of the workload."""
        return self.sequences * -(-self.context // self.block_size)

    def step_tokens(self, num_stages: int) -> int:
        """Of the workload's sequences, those of one micro-batch, when all stages have one."""
        return -(-self.sequences // min(num_stages, self.sequences))


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One format for all layers; or a better one for some, where there are two."""

    format: str
    """Of the layers that are not in the better one."""
    better: str | None = None
    min_better: int = 0
    """Layers that have to be in the better one, for the bits that are asked."""
    format_bits: float
    """For each weight."""
    better_bits: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to store what is not a layer."""

    embedding_place: str
    kv_format: str


def layer_formats(request: PlanRequest, variant: Variant, layers: str, kind: str) -> ModelFormats:
    """All formats of the model with its layers in one, on devices of a kind ("gpu", "cpu").

    Raises:
        PlacementError: formats do not go together, or not with such devices.
    """
    try:
        formats = model_formats(
            request.model,
            layers,
            head=request.head_format,
            kv=variant.kv_format,
            embedding_place=variant.embedding_place,
            device="cpu" if kind == "cpu" else "cuda",
        )
    except ValueError as error:
        raise PlacementError(str(error)) from error
    if kind == "gpu" and Format.FP32 in (formats.layers, formats.head):
        raise PlacementError("fp32 is for CPUs: stages on GPUs compute in 16 bits. Choose bf16")
    if request.mix is None:
        return formats
    group_size = formats.group_size
    stored: tuple[dict[Role, Scheme], ...] = tuple(
        {role: Scheme(format=fmt, group_size=group_size) for role, fmt in layer.items()}
        for layer in request.mix
    )
    return ModelFormats(
        layers=formats.layers,
        anew=formats.anew,
        anew_by_layer=formats.anew_by_layer,
        head=formats.head,
        kv=formats.kv,
        group_size=group_size,
        embedding_on_host=formats.embedding_on_host,
        on_gpu=formats.on_gpu,
        stored=stored,
    )


def parts_of(request: PlanRequest, variant: Variant, level: Level, kind: str) -> Parts:
    """Bytes of the model's parts."""
    return model_parts(
        request.model,
        layer_formats(request, variant, level.format, kind),
        layer_formats(request, variant, level.better, kind) if level.better else None,
        block_size=request.block_size,
        max_batch_tokens=request.max_batch_tokens,
    )


def levels(request: PlanRequest, kind: str) -> list[Level]:
    """What layers may be stored in that keeps the bound on quality, fewest bits first.

    A format that takes no less than one of more bits, as one in whole tiles may in narrow layers,
    is left out.

    Raises:
        PlacementError: no format that is allowed has so many bits.
    """
    anything = Variant(embedding_place="host", kv_format=request.kv_formats[0])
    found: dict[str, float] = {}
    smallest = math.inf
    names = {Format.INT4: None} if request.mix is not None else dict.fromkeys(request.formats)
    formats = {name: layer_formats(request, anything, name, kind) for name in names}
    layers = range(request.model.num_layers)
    bits = {name: bits_per_weight(request.model, formats[name], layers) for name in names}
    for name in sorted(names, key=lambda name: (-bits[name], name)):
        size = sum(layer_bytes(request.model, formats[name], i) for i in layers)
        if size < smallest:
            found[name], smallest = bits[name], size
    ranked = list(found)[::-1]
    make = partial(_mixed if request.is_mixed and len(ranked) > 1 else _uniform, request, found)
    kept = list(make(ranked))
    if not kept:
        raise PlacementError(
            f"{request.min_bits:g} bits per weight are asked for, and {ranked[-1]} has "
            f"{found[ranked[-1]]:.2f}. Allow a format of more bits, or ask for fewer"
        )
    return kept


def _uniform(request: PlanRequest, bits: Mapping[str, float], ranked: list[str]) -> Iterator[Level]:
    for name in ranked:
        if bits[name] >= request.min_bits:
            yield Level(format=name, format_bits=bits[name])


def _mixed(request: PlanRequest, bits: Mapping[str, float], ranked: list[str]) -> Iterator[Level]:
    num_layers = request.model.num_layers
    for less, more in pairwise(ranked):
        if bits[more] < request.min_bits or bits[less] == bits[more]:
            continue
        share = (request.min_bits - bits[less]) / (bits[more] - bits[less])
        yield Level(
            format=less,
            better=more,
            min_better=max(0, math.ceil(share * num_layers - 1e-9)),
            format_bits=bits[less],
            better_bits=bits[more],
        )


def variants(request: PlanRequest, level: Level, kind: str) -> list[Variant]:
    """Ways to store the rest, but for those than which another takes no more of anything."""
    found: list[tuple[Variant, Parts]] = []
    for place, kv_format in product(request.embedding_places, request.kv_formats):
        variant = Variant(embedding_place=place, kv_format=kv_format)
        found.append((variant, parts_of(request, variant, level, kind)))
    return [
        variant
        for number, (variant, parts) in enumerate(found)
        if not any(
            other.is_no_larger_than(parts)
            and (place < number or not parts.is_no_larger_than(other))
            for place, (_, other) in enumerate(found)
            if place != number
        )
    ]

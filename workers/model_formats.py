"""In which format each part of a model is held. No torch: the planner and the stage share it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

from tightfit.kernels.formats import (
    GROUP_SIZES,
    WEIGHT_BITS,
    Format,
    KVFormat,
    activation_dtype,
)
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.stored import StoredScheme

AUTO = "auto"
"""What the model and the other formats suggest."""

DENSE = {"fp32": Format.FP32, "bf16": Format.BF16}


class Role(StrEnum):
    """A linear layer's place in the model."""

    QKV = "qkv"
    ATTN_OUT = "attn_out"
    MLP_UP = "mlp_up"
    MLP_DOWN = "mlp_down"
    PROJECT_IN = "project_in"
    PROJECT_OUT = "project_out"
    HEAD = "head"


BLOCK_ROLES = (Role.QKV, Role.ATTN_OUT, Role.MLP_UP, Role.MLP_DOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """How one linear layer is stored."""

    format: Format
    group_size: int | None = None
    """Input features that share a scale in `int4` and `int3`; None: `default_group_size`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFormats:
    """The formats of a whole model."""

    layers: Format
    """Of the blocks' linear layers; where they differ, of most."""
    anew: Format
    """Of the blocks' linear layers that are not held as the checkpoint has them."""
    anew_by_layer: tuple[Format, ...] = ()
    """The same for each block, where blocks differ."""
    head: Format
    """Of the LM head."""
    kv: KVFormat
    """Of keys and values."""
    group_size: int | None = None
    """Input features that share a scale in the blocks' layers; None: each layer has its default."""
    embedding_on_host: bool = False
    """The embedding's table takes nothing of its stage's memory."""
    outlier_threshold: float | None = None
    """Of `llm_int8`; None: by the layer, as `quantize_linear` has it."""
    on_gpu: bool = False
    """Weights of 4 and 3 bits lie as a GPU wants them."""
    stored: tuple[Mapping[Role, Scheme], ...] = ()
    """For each layer, what is held as the checkpoint has it; empty: nothing is."""

    @property
    def activations(self) -> str:
        """Name of the dtype of hidden states, norms and embedding."""
        return activation_dtype(self.layers)

    @property
    def has_dense_head(self) -> bool:
        """The LM head's weight is held as the embedding's is."""
        return self.head is DENSE[self.activations]

    def is_held(self, role: Role, layer: int | None) -> bool:
        """The linear layer is held as the checkpoint has it."""
        return layer is not None and bool(self.stored) and role in self.stored[layer]

    def scheme(self, role: Role, layer: int | None = None) -> Scheme:
        """Of one linear layer; `layer` is None for those outside the blocks."""
        if layer is not None and self.is_held(role, layer):
            return self.stored[layer][role]
        if role is Role.HEAD:
            return Scheme(format=self.head)
        if layer is None:
            return Scheme(format=self.layers)
        anew = self.anew_by_layer[layer] if self.anew_by_layer else self.anew
        return Scheme(format=anew, group_size=self.group_size)


def model_formats(
    config: DecoderConfig,
    layers: str | Sequence[str] = AUTO,
    *,
    head: str = AUTO,
    kv: str = AUTO,
    embedding_place: str = "device",
    outlier_threshold: float | None = None,
    device: str = "cpu",
) -> ModelFormats:
    """The formats that an operator asked for, for a model.

    Args:
        config: the model.
        layers: a `Format`, or "auto": what the checkpoint is quantised to, layer by layer, else
            int8. Where it is quantised to the format that is asked for, its numbers are held as
            they are; else they are widened and quantised anew. Or one of these for each layer.
        head: a `Format`, or "auto": as the layers, but int8 where they have fewer bits. The head
            picks every token, and is small beside the layers of a large model.
        kv: a `KVFormat` of integers, or "auto": the activations' dtype.
        embedding_place: "device" or "host", as `StageSpec.embedding_place`.
        outlier_threshold: of `llm_int8`, as `StageSpec.llm_int8_threshold`.
        device: torch device name, as `StageSpec.device`.

    Raises:
        ValueError: formats whose activations are of different dtypes, or not one for each layer.
    """
    wanted = [layers] * config.num_layers if isinstance(layers, str) else list(layers)
    if len(wanted) != config.num_layers:
        raise ValueError(f"{len(wanted)} formats for {config.num_layers} layers")
    stored = tuple(_stored_layer(config, i, name) for i, name in enumerate(wanted))
    anew = tuple(Format.INT8 if name == AUTO else Format(name) for name in wanted)
    if len({activation_dtype(fmt) for fmt in anew}) > 1:
        raise ValueError("some layers in fp32 and some not: choose fp32 for all or for none")
    fmt = anew[0] if set(wanted) == {anew[0]} else _most_common(stored, anew)
    stored = stored if any(stored) else ()
    make = partial(
        ModelFormats,
        layers=fmt,
        anew=anew[0],
        anew_by_layer=anew if len(set(anew)) > 1 else (),
        kv=KVFormat(activation_dtype(fmt) if kv == AUTO else kv),
        group_size=common_group_size(config),
        embedding_on_host=embedding_place == "host",
        outlier_threshold=outlier_threshold,
        on_gpu=device != "cpu",
        stored=stored,
    )
    if head == AUTO:
        small = fmt in WEIGHT_BITS
        return make(head=Format.INT8 if small else fmt)
    head_fmt = Format(head)
    if activation_dtype(head_fmt) != activation_dtype(fmt):
        raise ValueError(
            f"layers in {fmt} compute in {activation_dtype(fmt)} and a head in {head_fmt} in "
            f"{activation_dtype(head_fmt)}: choose fp32 for both or for neither"
        )
    return make(head=head_fmt)


def common_group_size(config: DecoderConfig) -> int | None:
    """The largest usual group size that divides the width of every layer in a block, if there is
    one: transformers reads a checkpoint only if all its layers share one."""
    widths = {linear.n_in for linear in config.layer_linears(0)}
    fits = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return next(fits, None)


def _most_common(stored: Iterable[Mapping[Role, Scheme]], anew: Iterable[Format]) -> Format:
    """Of the blocks' linear layers, those that are not held being as `anew` says."""
    counts = Counter(
        layer[role].format if role in layer else fresh
        for layer, fresh in zip(stored, anew, strict=True)
        for role in BLOCK_ROLES
    )
    return counts.most_common(1)[0][0]


def layer_roles(config: DecoderConfig, i: int) -> dict[Role, tuple[str, ...]]:
    """The linear layers of a block, without prefix, in the order in which it computes them; those
    with the same input are one."""
    n = config.names
    roles = {
        Role.QKV: n.qkv, Role.ATTN_OUT: (n.attn_out,), Role.MLP_UP: n.mlp_up,
        Role.MLP_DOWN: (n.mlp_down,),
    }  # fmt: skip
    return {role: tuple(name.format(i=i) for name in names) for role, names in roles.items()}


def _stored_layer(config: DecoderConfig, i: int, wanted: str) -> Mapping[Role, Scheme]:
    """What of one layer is held as the checkpoint has it."""
    held = {}
    for role, names in layer_roles(config, i).items():
        schemes = {config.stored_scheme(name) for name in names}
        scheme = schemes.pop()
        if scheme is None or schemes or scheme.format is None:
            continue
        has_int8 = wanted == Format.LLM_INT8 and scheme.format is Format.INT8
        if has_int8 or wanted in (AUTO, scheme.format):
            fmt = Format.LLM_INT8 if has_int8 else scheme.format
            held[role] = Scheme(format=fmt, group_size=_group_size(scheme, config, role))
    return held


def _group_size(scheme: StoredScheme, config: DecoderConfig, role: Role) -> int | None:
    """Explicit where one scale is for a whole channel of a layer in groups."""
    if scheme.format not in WEIGHT_BITS or scheme.group_size is not None:
        return scheme.group_size
    widths = {
        Role.ATTN_OUT: config.num_heads * config.head_dim, Role.MLP_DOWN: config.intermediate_size,
    }  # fmt: skip
    return widths.get(role, config.hidden_size)

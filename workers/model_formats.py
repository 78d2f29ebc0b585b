"""In which format each part of a model is held. No torch: the planner and the stage share it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tightfit.kernels.formats import WEIGHT_BITS, Format, activation_dtype

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
    """Of the blocks' linear layers."""
    head: Format
    """Of the LM head."""

    @property
    def activations(self) -> str:
        """Name of the dtype of hidden states, norms, embedding and KV cache."""
        return activation_dtype(self.layers)

    @property
    def has_dense_head(self) -> bool:
        """The LM head's weight is held as the embedding's is."""
        return self.head is DENSE[self.activations]

    def scheme(self, role: Role) -> Scheme:
        """Of one linear layer."""
        return Scheme(format=self.head if role is Role.HEAD else self.layers)


def model_formats(layers: str, *, head: str = AUTO) -> ModelFormats:
    """The formats that an operator asked for.

    Args:
        layers: a `Format`.
        head: a `Format`, or "auto": as the layers, but int8 where they have fewer bits. The head
            picks every token, and is small beside the layers of a large model.

    Raises:
        ValueError: the head's format has activations of another dtype than the layers'.
    """
    fmt = Format(layers)
    if head == AUTO:
        return ModelFormats(layers=fmt, head=Format.INT8 if fmt in WEIGHT_BITS else fmt)
    head_fmt = Format(head)
    if activation_dtype(head_fmt) != activation_dtype(fmt):
        raise ValueError(
            f"layers in {fmt} compute in {activation_dtype(fmt)} and a head in {head_fmt} in "
            f"{activation_dtype(head_fmt)}: choose fp32 for both or for neither"
        )
    return ModelFormats(layers=fmt, head=head_fmt)

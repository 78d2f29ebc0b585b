"""Weight formats: their names and what they cost in bytes. Standard library only.

T tokens, N output features, K input features.
"""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """How a linear layer's weights are stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    """int8 values [N, K], one bf16 scale per output channel; activations stay in bf16."""
    LLM_INT8 = "llm_int8"
    """The same weights; with many tokens activations are int8 too, outlier columns in bf16."""


SUPPORTED_FORMATS = tuple(Format)

BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2}


def activation_dtype(fmt: Format) -> str:
    """Name of the dtype in which hidden states, norms, embedding and KV cache are kept."""
    return "fp32" if fmt is Format.FP32 else "bf16"


def linear_bytes(fmt: Format, n_out: int, n_in: int, *, bias: bool = False) -> int:
    """Bytes of one linear layer of weight [n_out, n_in] in `fmt`, scales and bias included."""
    act = BYTES_PER_ELEMENT[activation_dtype(fmt)]
    total = n_out * act if bias else 0
    if fmt in (Format.FP32, Format.BF16):
        return total + n_out * n_in * act
    return total + n_out * n_in + n_out * act

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
    """The same weights; with many tokens activations of large layers are int8 too, outlier columns
    in bf16."""
    INT4 = "int4"
    """4 bits, asymmetric, a scale and a zero point per group of input features."""
    INT3 = "int3"
    """The same with 3 bits, densely packed."""


SUPPORTED_FORMATS = tuple(Format)


class KVFormat(StrEnum):
    """How keys and values are stored."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    """int8 values [D] and one bf16 scale, for each head and token."""


KV_SCALE_BYTES = 2

GROUP_SIZES = (128, 64, 32)
"""Input features that share a scale: the first of these that divides K, else all of a channel's."""

WEIGHT_BITS = {Format.INT4: 4, Format.INT3: 3}

VALUES_PER_PACK = {4: 2, 3: 32}
"""Integers of so many bits that are packed together: in one byte, in three words."""

BYTES_PER_PACK = {4: 1, 3: 12}

OUTLIER_THRESHOLD = 6.0
"""|x| from which LLM.int8() takes a feature's column for an outlier (arXiv 2208.07339, section
3.2)."""

DECOMPOSED_WIDTH = 4096
"""Input and output features from which on, of both, a layer in `llm_int8` has activations in int8
where no threshold is given: as many as the layers of a model of 6.7B parameters have. From there
on the paper's threshold keeps what int8 would lose; smaller models lose by it, and gain little
time."""

OLDEST_CAPABILITY = (8, 0)
"""Of GPUs that stages run on: activations are bf16, in which older chips do not compute."""

TILE_ROWS = 64
TILE_FEATURES = {4: 128, 3: 256}
"""Output and input features of one tile of `packing.Layout.TILES`, by bits."""
TILE_PIECE = 32
"""Input features of a tile that are neighbours in one row of it."""

BYTES_PER_ELEMENT = {"fp32": 4, "bf16": 2}


def activation_dtype(fmt: Format) -> str:
    """Name of the dtype in which hidden states, norms and embedding are kept."""
    return "fp32" if fmt is Format.FP32 else "bf16"


def default_group_size(n_in: int) -> int:
    """Input features that share a scale, of a weight with `n_in` of them."""
    return next((size for size in GROUP_SIZES if n_in % size == 0), n_in)


def kv_vector_bytes(fmt: KVFormat, head_dim: int) -> int:
    """Bytes of one key, or one value, of `head_dim` elements: one head and token."""
    if fmt is KVFormat.INT8:
        return head_dim + KV_SCALE_BYTES
    return head_dim * BYTES_PER_ELEMENT[fmt]


def linear_bytes(
    fmt: Format,
    n_out: int,
    n_in: int,
    *,
    group_size: int | None = None,
    bias: bool = False,
    is_tiled: bool = False,
) -> int:
    """Bytes of one linear layer of weight [n_out, n_in] in `fmt`, scales and bias included.

    `group_size` counts for `int4` and `int3`; None: `default_group_size`. So does `is_tiled`: they
    lie in whole tiles (`packing.Layout.TILES`), as on a GPU.
    """
    act = BYTES_PER_ELEMENT[activation_dtype(fmt)]
    total = n_out * act if bias else 0
    if fmt in (Format.FP32, Format.BF16):
        return total + n_out * n_in * act
    if fmt in WEIGHT_BITS:
        bits = WEIGHT_BITS[fmt]
        num_groups = n_in // (group_size or default_group_size(n_in))
        total += n_out * num_groups * 2 * act
        if is_tiled:
            tiles = -(-n_out // TILE_ROWS) * -(-n_in // TILE_FEATURES[bits])
            return total + tiles * TILE_ROWS * TILE_FEATURES[bits] * bits // 8
        return total + n_out * -(-n_in // VALUES_PER_PACK[bits]) * BYTES_PER_PACK[bits]
    return total + n_out * n_in + n_out * act

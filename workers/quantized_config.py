"""What config.json says of a checkpoint that `quantizer` writes, as compressed-tensors does."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tightfit.kernels.formats import WEIGHT_BITS, Format, default_group_size
from tightfit.workers.decoder_config import DecoderConfig, LinearShape
from tightfit.workers.errors import CheckpointError
from tightfit.workers.model_formats import common_group_size
from tightfit.workers.stored import REAL_ZERO_DTYPE, Packing, StoredScheme

MIXED: Final = "mixed-precision"
"""What compressed-tensors calls it where layers are packed in several ways."""


def check_group_size(config: DecoderConfig, wanted: int | None, path: str | Path) -> None:
    """Refuse a group size that does not divide every layer's width.

    Raises:
        CheckpointError: it does not.
    """
    for linear in config.layer_linears(0):
        if wanted and linear.n_in % wanted:
            raise CheckpointError(
                path,
                linear.name,
                f"has {linear.n_in} input features, which groups of {wanted} do not divide; "
                "leave the group size out, and each layer gets one that does",
            )


def written_group_size(config: DecoderConfig, wanted: int | None, n_in: int) -> int | None:
    """Input features that share a scale in a linear layer with `n_in` of them; None: all.

    Args:
        config: the model.
        wanted: None: `common_group_size` of the model, else the default of each layer; 0: one
            scale for each output channel.
        n_in: K.
    """
    if wanted is None:
        wanted = common_group_size(config) or default_group_size(n_in)
    return wanted or None


def written_scheme(fmt: Format, *, group_size: int | None, method: str) -> StoredScheme:
    """How a linear layer is stored.

    Args:
        fmt: `int8`, `int4` or `int3`.
        group_size: input features that share a scale in `int4` and `int3`; None: all of a channel.
        method: by which those are rounded. HQQ's zero points are real with 4 bits, which is the
            better for it; with 3 it is the worse.
    """
    if fmt not in WEIGHT_BITS:
        return StoredScheme(packing=Packing.WORDS, bits=8, group_size=None, is_symmetric=True)
    has_real_zero = method == "hqq" and fmt is Format.INT4
    packing = Packing.DENSE_4 if has_real_zero else Packing.WORDS
    return StoredScheme(
        packing=Packing.DENSE_3 if fmt is Format.INT3 else packing,
        bits=WEIGHT_BITS[fmt],
        group_size=group_size,
        has_real_zero=has_real_zero,
    )


def quantization_config(
    config: DecoderConfig, schemes: Mapping[str, StoredScheme]
) -> dict[str, Any]:
    """The section `quantization_config`: all linear layers of all blocks, and nothing else.

    Args:
        config: the model.
        schemes: how each of them is stored, by its name without prefix.
    """
    groups: dict[StoredScheme, list[str]] = {}
    for scheme, target in _targets(config, schemes):
        groups.setdefault(scheme, []).append(target)
    packings = {str(scheme.packing.value) for scheme in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": packings.pop() if len(packings) == 1 else MIXED,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": _config_group(one, names) for i, (one, names) in enumerate(groups.items())
        },
    }


def _targets(
    config: DecoderConfig, schemes: Mapping[str, StoredScheme]
) -> Iterator[tuple[StoredScheme, str]]:
    """Patterns for the names of linear layers that are stored alike: of all blocks, or of some."""
    n = config.names
    for name in (*n.qkv, n.attn_out, *n.mlp_up, n.mlp_down):
        blocks: dict[StoredScheme, list[str]] = {}
        for i in range(config.num_layers):
            blocks.setdefault(schemes[name.format(i=i)], []).append(str(i))
        for scheme, numbers in blocks.items():
            number = "[0-9]+" if len(blocks) == 1 else f"({'|'.join(numbers)})"
            yield scheme, f"re:.*{re.escape(name).replace(re.escape('{i}'), number)}$"


def _config_group(scheme: StoredScheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    if scheme.has_real_zero:
        weights["zp_dtype"] = REAL_ZERO_DTYPE
    return {"targets": targets, "format": str(scheme.packing.value), "weights": weights}


def stored_bits(scheme: StoredScheme, linear: LinearShape) -> int:
    """Of one linear layer in the files: integers, scales and zero points."""
    groups = linear.n_out * scheme.num_groups(linear.n_in)
    per_group = 16 if scheme.is_symmetric else 16 + _zero_bits(scheme)
    return scheme.bits * linear.n_out * linear.n_in + groups * per_group


def _zero_bits(scheme: StoredScheme) -> int:
    if scheme.has_real_zero:
        return 16
    return 8 if scheme.is_dense else scheme.bits

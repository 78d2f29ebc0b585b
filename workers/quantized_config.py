"""What config.json says of a checkpoint that `quantizer` writes, as compressed-tensors does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from tightfit.workers.decoder_config import DecoderConfig, LinearShape
from tightfit.workers.stored import REAL_ZERO_DTYPE, StoredScheme


def quantization_config(
    config: DecoderConfig, scheme: Callable[[int], StoredScheme]
) -> dict[str, Any]:
    """The section `quantization_config`: all linear layers of all blocks, and nothing else.

    Args:
        config: the model.
        scheme: K → how a linear layer with K input features is stored.
    """
    groups: dict[StoredScheme, list[str]] = {}
    for name, n_in in _templates(config):
        groups.setdefault(scheme(n_in), []).append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": str(next(iter(groups)).packing.value),
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": _config_group(one, names) for i, (one, names) in enumerate(groups.items())
        },
    }


def _templates(config: DecoderConfig) -> Iterator[tuple[str, int]]:
    """A pattern for the names of each linear layer of a block, and its input features."""
    n = config.names
    names = (*n.qkv, n.attn_out, *n.mlp_up, n.mlp_down)
    for name, linear in zip(names, config.layer_linears(0), strict=True):
        yield f"re:.*{re.escape(name).replace(re.escape('{i}'), '[0-9]+')}$", linear.n_in


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

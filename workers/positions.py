"""Positions: ALiBi slopes and rotary angles. D head size, H heads, T tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tightfit.workers.decoder_config import Rope


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope per head, [H] fp32 (ALiBi, arXiv 2108.12409; BLOOM's rule for other head counts).

    With p the largest power of two ≤ H: the first p are 2^(-8 i / p), i = 1..p; the others are
    every
    second slope of 2 p heads.

    >>> alibi_slopes(8)[:2].tolist()
    [0.5, 0.25]
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * i / power) for i in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


def rotary_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Angle per position of each pair of features, [D / 2] fp32.

    "dynamic" is served up to the trained context only, where it is the unscaled embedding.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(base, rope)
    if rope.kind == "yarn":
        return _yarn(base, rope, head_dim)
    return base


def _llama3(base: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, a ramp between."""
    wavelength = 2 * math.pi / base
    turns = rope.original_max_position / wavelength
    ramp = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    ramp = ramp.clamp(0.0, 1.0)
    return (1 - ramp) * base / rope.factor + ramp * base


def _yarn(base: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """YaRN, arXiv 2309.00071, section 3.2: interpolate by parts, ramp over dimensions."""

    def dimension_of(turns: float) -> float:
        length = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


def rotary_rows(
    frequencies: Tensor, positions: Tensor, attention_factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `x · cos + roll(x, D/2) · sin`, each [T, 1, D].

    Args:
        frequencies: [D / 2] fp32.
        positions: [T] int64.
    """
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos() * attention_factor, angles.sin() * attention_factor
    return (
        torch.cat((cos, cos), dim=-1)[:, None].to(dtype),
        torch.cat((-sin, sin), dim=-1)[:, None].to(dtype),
    )

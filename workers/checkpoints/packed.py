"""Linear layers of quantised checkpoints: their tensors as whole numbers and scales.

N output features, K input features, G groups; see `stored.py` for what the names mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tightfit.kernels.groups import INT8_MIDDLE, Quantized
from tightfit.kernels.packing import unpack_rows
from tightfit.workers.stored import Packing, StoredScheme

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the eight values of a word of AWQ lie: value i is the AWQ_ORDER[i]-th from the low end."""

BITSANDBYTES_MAX = 127


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear:
    """One linear layer's weight as the checkpoint has it."""

    weight: Quantized
    """[N, K], columns sorted by group."""
    order: Tensor | None = None
    """[K] int64: column i belongs to input feature order[i]; None: to feature i."""

    def rows(self, index: Tensor) -> StoredLinear:
        """Some output features, in this order."""
        return StoredLinear(weight=self.weight.rows(index), order=self.order)

    def dequantize(self) -> Tensor:
        """The weight that is meant, [N, K] fp32, features in the model's order."""
        weight = self.weight.dequantize()
        if self.order is None:
            return weight
        return torch.empty_like(weight).index_copy_(1, self.order, weight)


def stacked(parts: Sequence[StoredLinear]) -> StoredLinear | None:
    """Layers of one input one below the other; None where their bits, groups or order differ."""
    weights = [part.weight for part in parts]
    first = parts[0]
    alike = all(
        weight.bits == weights[0].bits and weight.scale.shape[1] == weights[0].scale.shape[1]
        for weight in weights
    )
    if not alike or not all(_same_order(part.order, first.order) for part in parts):
        return None
    whole = Quantized(
        bits=weights[0].bits,
        integers=torch.cat([weight.integers for weight in weights]),
        scale=torch.cat([weight.scale for weight in weights]),
        zero_point=torch.cat([weight.zero_point for weight in weights]),
    )
    return StoredLinear(weight=whole, order=first.order)


def _same_order(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def read_stored(
    tensors: Mapping[str, Tensor], scheme: StoredScheme, n_out: int, n_in: int
) -> StoredLinear:
    """One layer out of its tensors, by the last part of their names.

    Raises:
        ValueError: a scale or zero point is not finite, or a feature's group does not exist.
    """
    match scheme.packing:
        case Packing.GPTQ:
            return _gptq(tensors, scheme)
        case Packing.AWQ:
            return _awq(tensors, scheme)
        case Packing.BITSANDBYTES:
            scale = tensors["SCB"].float()[:, None] / BITSANDBYTES_MAX
            return _made(scheme, _from_signed(tensors["weight"]), scale, None)
        case Packing.GGUF:
            return _gguf_blocks(tensors["weight_blocks"], scheme)
        case _:
            return _compressed_tensors(tensors, scheme, n_out, n_in)


def _made(
    scheme: StoredScheme,
    integers: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    group_of: Tensor | None = None,
) -> StoredLinear:
    """With the checks and defaults that all packings share."""
    for name, numbers in (("scale", scale), ("zero point", zero_point)):
        if numbers is not None and not bool(torch.isfinite(numbers).all()):
            raise ValueError(f"a {name} is NaN or infinite")
    if zero_point is None:
        zero_point = torch.full_like(scale, 2 ** (scheme.bits - 1), dtype=torch.float32)
    order = None if group_of is None else _order(group_of, scale.shape[1])
    if order is not None:
        integers = integers.index_select(1, order)
    weight = Quantized(
        bits=scheme.bits, integers=integers, scale=scale.float(), zero_point=zero_point.float()
    )
    return StoredLinear(weight=weight, order=order)


def _order(group_of: Tensor, num_groups: int) -> Tensor | None:
    """Features sorted by group, or None when they are so already.

    Raises:
        ValueError: the groups are not of one size each.
    """
    counts = torch.bincount(group_of.long().clamp_min(0), minlength=num_groups)
    if bool((group_of < 0).any()) or bool((counts != len(group_of) // num_groups).any()):
        raise ValueError(f"its features are not divided into {num_groups} groups of one size")
    order = torch.argsort(group_of, stable=True)
    return None if torch.equal(order, torch.arange(len(order))) else order


def _compressed_tensors(
    tensors: Mapping[str, Tensor], scheme: StoredScheme, n_out: int, n_in: int
) -> StoredLinear:
    scale, zero_point = tensors["weight_scale"], tensors.get("weight_zero_point")
    if scheme.packing is Packing.BYTES:
        signed = None if zero_point is None else zero_point.float() + INT8_MIDDLE
        return _made(scheme, _from_signed(tensors["weight"]), scale, signed)
    packed = tensors["weight_packed"]
    if scheme.packing is Packing.DENSE_3:
        integers = unpack_rows(packed.view(n_out, -1, 3), bits=3, n_in=n_in).to(torch.uint8)
        return _made(scheme, integers, scale, zero_point)
    integers = _unpacked(packed, scheme.bits)[:, :n_in].contiguous()
    if zero_point is not None and not scheme.is_dense:
        zero_point = _unpacked(zero_point.t(), scheme.bits)[:, :n_out].t()
    return _made(scheme, integers, scale, zero_point, tensors.get("weight_g_idx"))


def _gptq(tensors: Mapping[str, Tensor], scheme: StoredScheme) -> StoredLinear:
    integers = _unpacked(tensors["qweight"].t(), scheme.bits)
    zero_point = _unpacked(tensors["qzeros"], scheme.bits).float() + scheme.zero_offset
    scale = tensors["scales"].t()
    return _made(scheme, integers, scale, zero_point.t(), tensors.get("g_idx"))


def _awq(tensors: Mapping[str, Tensor], scheme: StoredScheme) -> StoredLinear:
    integers = _in_awq_order(_unpacked(tensors["qweight"], scheme.bits))
    zero_point = _in_awq_order(_unpacked(tensors["qzeros"], scheme.bits))
    return _made(scheme, integers.t().contiguous(), tensors["scales"].t(), zero_point.t())


def _gguf_blocks(blocks: Tensor, scheme: StoredScheme) -> StoredLinear:
    """uint8 [N, G, bytes of a block]; see `Packing.GGUF`."""
    header = 2 if scheme.is_symmetric else 4
    numbers = blocks[..., :header].contiguous().view(torch.float16).float()
    halves = blocks[..., header:]
    integers = torch.cat((halves & 15, halves >> 4), -1)
    if scheme.is_symmetric:
        return _made(scheme, integers.flatten(1), numbers[..., 0], None)
    scale, least = numbers.unbind(-1)
    # A block of equal values has scale 0: the middle integer with a zero point that gives them.
    is_flat = scale == 0
    middle = 2 ** (scheme.bits - 1)
    integers.masked_fill_(is_flat[..., None], middle)
    scale = torch.where(is_flat, least.abs(), scale).masked_fill_(is_flat & (least == 0), 1.0)
    zero_point = torch.where(is_flat, middle, 0) - least / scale
    return _made(scheme, integers.flatten(1), scale, zero_point)


def _in_awq_order(values: Tensor) -> Tensor:
    """[R, C], the eight of each word put in the order of the features."""
    words = values.view(values.shape[0], -1, len(AWQ_ORDER))
    return words[..., torch.tensor(AWQ_ORDER)].flatten(1)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """int32 words [R, C] of 8 or 4 bits each → uint8 [R, C · 32 / bits], lowest bits first."""
    pieces = words.contiguous().view(torch.uint8)  # little-endian: the lowest byte first
    return pieces if bits == 8 else unpack_rows(pieces, bits=bits, n_in=2 * pieces.shape[1])


def _from_signed(values: Tensor) -> Tensor:
    """int8 in [-128, 127] → uint8, 0 becoming 128."""
    return values.contiguous().view(torch.uint8).add(INT8_MIDDLE)

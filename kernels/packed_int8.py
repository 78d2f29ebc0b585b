"""int8 weights on CPUs with VNNI, packed by FBGEMM: products of whole numbers, exact.

FBGEMM multiplies int8 by int8, and reads a packed weight as fast as memory gives it for up to about
four rows at a time. torch's op for bf16 activations does not: it is bound by widening weights. Yet
activations need not lose what 8 bits lose. A token is two rows of the product, its first digits and
its second ones (`bind_digits`):

    x ≈ s · (d1 + d2 / 254),  s = max|x| / 127,  d1 = round(x / s),  d2 = round(254 · (x / s - d1))

Each x[k] is then off by at most max|x| / 64,516. A bf16 number is off by up to 1/512 of itself, so
features of a hundredth of the largest one are still as exact as bf16 has them.

What packing takes: torch's quantised tensors, which torch 2.13 has and deprecates. Without them, or
on other processors, everything is as in `cpu.py`; small layers are, too.

T tokens, N output features, K input features.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels import cpu, ops
from tightfit.kernels.formats import OUTLIER_THRESHOLD
from tightfit.kernels.groups import Quantized
from tightfit.kernels.ops import Kernel
from tightfit.kernels.weights import INT8_MAX, Int8Weight, quantize_rows

ENGINE: Final = "fbgemm"

PACKED_FROM: Final = 2**24
"""Weights of a layer from which on it is packed. Smaller ones lose with many tokens, to the second
digits, what they gain with few (4096 × 2048: one token 0.32 ms instead of 0.48, 256 of them 18
instead of 11). From 4096 × 4096 on no number of tokens is slower."""

MAX_N_IN: Final = (2**31 - 1) // INT8_MAX**2
"""Features whose products fit int32."""

DIGIT: Final = 2 * INT8_MAX
"""Steps of the second digit in one of the first."""

INPUT_ZERO: Final = 128
"""FBGEMM's activations are uint8: -128 is 0."""

CHUNK_TOKENS: Final = 128
"""Tokens multiplied at a time, so that their digits and products take little memory. The weight is
read again for the next, which takes a tenth of the time or less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInt8Weight:
    """What `Int8Weight` is, with its values as FBGEMM packs them."""

    packed: torch.ScriptObject
    """The values; FBGEMM adds 4 bytes for each output feature, and pads K, by under 2 %."""
    n_out: int
    """N."""
    n_in: int
    """K."""
    scale: Tensor
    """[N] bf16, positive: weight ≈ values · scale."""
    outlier_threshold: float = OUTLIER_THRESHOLD
    """LLM.int8()'s, in whose products alone it counts."""

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.n_out * self.n_in + self.scale.nbytes

    def unpack(self) -> Int8Weight:
        """The same numbers as they were before; takes as much memory again."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            values = torch.ops.quantized.linear_unpack(self.packed)[0].int_repr()
        return Int8Weight(values=values, scale=self.scale, outlier_threshold=self.outlier_threshold)


AnyInt8Weight = Int8Weight | PackedInt8Weight


def pack_int8(weight: Tensor, _: int | None, device: str) -> AnyInt8Weight:
    """See `quantize_rows`; packed where that pays."""
    return _packed(quantize_rows(weight, device=device))


def hold_int8(weight: Quantized) -> AnyInt8Weight:
    """See `ops.hold_int8`; packed where that pays."""
    return _packed(ops.hold_int8(weight))


def _packed(weight: Int8Weight) -> AnyInt8Weight:
    n_out, n_in = weight.values.shape
    if n_out * n_in < PACKED_FROM or n_in > MAX_N_IN or not is_exact():
        return weight
    return PackedInt8Weight(
        packed=_pack_values(weight.values), n_out=n_out, n_in=n_in, scale=weight.scale
    )


@functools.cache
def is_exact() -> bool:
    """This torch can pack, and its product on this processor is exact: without VNNI it adds pairs
    in 16 bits, and what is too large for them is cut off."""
    if ENGINE not in torch.backends.quantized.supported_engines:
        return False
    rows, n_in = (127.0, -128.0), 64
    values = torch.full((16, n_in), INT8_MAX, dtype=torch.int8)
    values[1::2].neg_()
    x = torch.tensor(rows)[:, None].expand(-1, n_in)
    try:
        y = _multiply(x, _pack_values(values))
    except (AttributeError, RuntimeError):  # an op that this build of torch does not have
        return False
    return torch.equal(y.double(), x.double() @ values.double().T)


def _pack_values(values: Tensor) -> torch.ScriptObject:
    """int8 [N, K], which are copied."""
    with warnings.catch_warnings(), _engine():
        warnings.simplefilter("ignore", UserWarning)  # see the module's text
        whole = torch._empty_affine_quantized((0,), scale=1.0, zero_point=0, dtype=torch.qint8)
        # The same memory under another type: a copy of the widest layer is 0.8 GB.
        whole.set_(values.untyped_storage(), 0, values.shape, values.stride())
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(whole, None)
    return packed


@contextmanager
def _engine() -> Iterator[None]:
    """torch packs for one engine, which is a global setting."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before


def _multiply(rows: Tensor, packed: torch.ScriptObject) -> Tensor:
    """Whole numbers in [-128, 127], fp32 [rows, K], times the packed values: fp32 [rows, N]."""
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    product: Tensor = multiply(rows, 1.0, INPUT_ZERO, packed)
    return product


def bind_few(weight: AnyInt8Weight, bias: Tensor | None) -> Kernel:
    """Weight-only int8: the weight is read once, as bytes."""
    if isinstance(weight, Int8Weight):
        return cpu.bind_int8_packed(weight, bias)
    return bind_digits(weight, bias)


def bind_many(weight: AnyInt8Weight, bias: Tensor | None) -> Kernel | None:
    """Weight-only int8 for many tokens; a packed weight has one op for all numbers of them."""
    return cpu.bind_int8_dequantized(weight, bias) if isinstance(weight, Int8Weight) else None


def bind_many_llm_int8(weight: AnyInt8Weight, bias: Tensor | None) -> Kernel:
    """LLM.int8() for many tokens."""
    if isinstance(weight, Int8Weight):
        return cpu.bind_llm_int8(weight, bias)
    return bind_llm_int8(weight, bias)


def bind_digits(weight: PackedInt8Weight, bias: Tensor | None) -> Kernel:
    """Weight-only int8 by two digits for each activation; see the module's text.

    A NaN or infinity in one row leaves the other rows' products finite.
    """
    packed, scale = weight.packed, weight.scale.float()
    wide_bias = None if bias is None else bias.float()

    def digits(x: Tensor) -> Tensor:
        tokens = x.shape[0]
        if tokens > CHUNK_TOKENS:
            starts = range(0, tokens, CHUNK_TOKENS)
            return torch.cat([digits(x[first : first + CHUNK_TOKENS]) for first in starts])
        step = x.abs().amax(1, keepdim=True).float().clamp_min_(cpu.TINY).div_(INT8_MAX)
        rows = torch.empty((2 * tokens, x.shape[1]))
        first, second = rows[:tokens], rows[tokens:]
        torch.div(x, step, out=second)
        torch.round(second, out=first)
        second.sub_(first).mul_(DIGIT).round_()
        y = _multiply(rows, packed)
        y = y[:tokens].add_(y[tokens:], alpha=1 / DIGIT).mul_(step).mul_(scale)
        return (y if wide_bias is None else y.add_(wide_bias)).to(x.dtype)

    return digits


def bind_llm_int8(weight: PackedInt8Weight, bias: Tensor | None) -> Kernel:
    """LLM.int8() for many tokens (see `reference.llm_int8_linear`).

    The outlier features' columns of the weight, which is packed, come out of the same product, by
    one more row for each: 1 in that feature and 0 elsewhere. Where that would be as many rows as
    second digits, these are taken for all features: no slower, and more exact.
    """
    packed, scale, threshold = weight.packed, weight.scale.float(), weight.outlier_threshold
    wide_bias = None if bias is None else bias.float()
    digits = bind_digits(weight, bias)

    def llm_int8(x: Tensor) -> Tensor:
        tokens, n_in = x.shape
        magnitude = x.abs()
        columns = (magnitude.amax(0) >= threshold).nonzero().view(-1) if tokens else magnitude
        if columns.shape[0] >= tokens:
            return digits(x)
        absmax = magnitude.index_fill_(1, columns, 0.0).amax(1, keepdim=True)
        step = absmax.float().clamp_min_(cpu.TINY).div_(INT8_MAX)
        rows = torch.zeros((tokens + columns.shape[0], n_in))
        torch.div(x.index_fill(1, columns, 0.0), step, out=rows[:tokens]).round_()
        rows[tokens:].scatter_(1, columns[:, None], 1.0)
        y = _multiply(rows, packed)
        outliers = x.index_select(1, columns).float()
        y = y[:tokens].mul_(step).addmm_(outliers, y[tokens:]).mul_(scale)
        return (y if wide_bias is None else y.add_(wide_bias)).to(x.dtype)

    return llm_int8

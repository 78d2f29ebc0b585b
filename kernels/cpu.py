"""CPU arithmetic on quantised weights, through torch's packed ops.

Each format has an op for few tokens, bound by reading weights, and may have one for many, bound by
arithmetic; from how many tokens on the second is faster is measured at load (`crossover.py`). A
`bind_*` function takes what does not change (weight [N, K], bias [N]) and returns the function of x
[T, K] → [T, N] that the decoder calls: what can be looked up once is looked up once.

T tokens, N output features, K input features. Activations are bf16 but for dense fp32 weights:
torch's packed int8 op has no fast path for fp32 activations.
"""

from __future__ import annotations

import functools
from typing import Final

import torch
from torch import Tensor

from tightfit.kernels.formats import default_group_size
from tightfit.kernels.groups import GroupWeight, Quantized, pack_groups, quantize_groups
from tightfit.kernels.ops import Kernel
from tightfit.kernels.packing import BLOCK_ROWS, Layout, pack_blocks
from tightfit.kernels.weights import INT8_MAX, Int8Weight

PACKED_K_MULTIPLE: Final = 16
PACKED_ALIGNMENT: Final = 32
"""`torch._weight_int8pack_mm` loads 16 elements at a time with aligned instructions: a row of
weights that does not begin at a multiple of 16 bytes, or of activations at one of 32, ends the
process with a segmentation fault (torch 2.13, AVX-512)."""

SCRATCH_ELEMENTS: Final = 2**21
"""Weights widened at a time for many tokens: 4 MB of bf16, in cache when it is multiplied."""

INT4_GROUP_SIZES: Final = (32, 64, 128, 256)
"""What `torch._weight_int4pack_mm_for_cpu` takes."""

PROBE_COLUMNS: Final = 32

TINY: Final = 1e-30
"""Row maximum below which a row counts as zeros: its scale's reciprocal stays finite in fp32."""


def bind_int8_packed(weight: Int8Weight, bias: Tensor | None) -> Kernel:
    """Weight-only int8 for few tokens: the weight is read once, as bytes.

    For K that is no multiple of 16 it is `bind_int8_dequantized`.
    """
    values, scale = weight.values, weight.scale
    if values.shape[1] % PACKED_K_MULTIPLE:
        return bind_int8_dequantized(weight, bias)
    packed = torch._weight_int8pack_mm

    def int8_packed(x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.data_ptr() % PACKED_ALIGNMENT:
            x = x.clone()
        y = packed(x, values, scale)
        return y if bias is None else y.add_(bias)

    return int8_packed


def bind_int8_dequantized(weight: Int8Weight, bias: Tensor | None) -> Kernel:
    """Weight-only int8 for many tokens: widen some rows to bf16, multiply, go on.

    The integers are exact in bf16, and the scales are applied to the product: one pass less over
    the weight (15 to 20 % of the time at 64 tokens), for one more rounding of the result.
    """
    values, scale = weight.values, weight.scale
    n_out, n_in = values.shape
    step = max(64, SCRATCH_ELEMENTS // max(1, n_in))
    linear = torch.nn.functional.linear

    def int8_dequantized(x: Tensor) -> Tensor:
        if n_out <= step:
            y = linear(x, values.to(x.dtype))
        else:
            y = x.new_empty((x.shape[0], n_out))
            for first in range(0, n_out, step):
                y[:, first : first + step] = linear(x, values[first : first + step].to(x.dtype))
        y.mul_(scale)
        return y if bias is None else y.add_(bias)

    return int8_dequantized


def bind_llm_int8(weight: Int8Weight, bias: Tensor | None) -> Kernel:
    """LLM.int8() for many tokens (see `reference.llm_int8_linear`), with `torch._int_mm`.

    y = ((x8 · w8ᵀ) · sx + x_out · w8_outᵀ) · sw + b, the sums in int32 and fp32. A NaN or infinity
    in one row leaves the other rows' products finite.
    """
    values, scale, threshold = weight.values, weight.scale, weight.outlier_threshold
    if values.shape[1] < 2:  # torch._int_mm misreads the strides of a [1, N] view
        return bind_int8_dequantized(weight, bias)
    transposed = values.t()

    def llm_int8(x: Tensor) -> Tensor:
        magnitude = x.abs()
        absmax = magnitude.amax(dim=1, keepdim=True)
        regular, columns = x, None
        if not absmax.max().item() < threshold:
            columns = (magnitude.amax(dim=0) >= threshold).nonzero().view(-1)
            absmax = magnitude.index_fill_(1, columns, 0.0).amax(dim=1, keepdim=True)
            regular = x.index_fill(1, columns, 0.0)
        scale_x = absmax.float().clamp_min_(TINY).div_(INT8_MAX)
        x8 = torch.mul(regular, scale_x.reciprocal()).round_().to(torch.int8)
        y = torch._int_mm(x8, transposed).float().mul_(scale_x)
        if columns is not None:
            w_out = transposed.index_select(0, columns).float()
            y.addmm_(x.index_select(1, columns).float(), w_out)
        y.mul_(scale)
        if bias is not None:
            y.add_(bias)
        return y.to(x.dtype)

    return llm_int8


@functools.cache
def reads_blocks() -> bool:
    """torch's op for 4 bits reads `Layout.BLOCKS` on this CPU: it depends on the instruction set,
    so one block is packed by torch and compared."""
    rows = torch.arange(BLOCK_ROWS, dtype=torch.int32)[:, None]
    integers = (rows * 7 + torch.arange(PROBE_COLUMNS, dtype=torch.int32) * 3) % 16
    theirs = torch._convert_weight_to_int4pack_for_cpu(integers, 1)
    return torch.equal(theirs.view(-1), pack_blocks(integers).view(-1))


def pack_int4(weight: Tensor, group_size: int | None, device: str) -> GroupWeight:
    """4 bits, in the layout that is fastest here; see `quantize_groups`."""
    fits = weight.ndim == 2 and _takes_blocks(weight.shape[0], weight.shape[1], group_size)
    layout = Layout.BLOCKS if fits else Layout.ROWS
    return quantize_groups(weight, bits=4, group_size=group_size, layout=layout, device=device)


def hold_int4(weight: Quantized) -> GroupWeight:
    """Numbers that are quantised already, in the layout that is fastest here."""
    n_out, n_in = weight.integers.shape
    fits = _takes_blocks(n_out, n_in, n_in // weight.scale.shape[1])
    return pack_groups(weight, layout=Layout.BLOCKS if fits else Layout.ROWS)


def _takes_blocks(n_out: int, n_in: int, group_size: int | None) -> bool:
    size = group_size or default_group_size(n_in)
    return n_out % BLOCK_ROWS == 0 and size in INT4_GROUP_SIZES and reads_blocks()


def bind_int4_packed(weight: GroupWeight, bias: Tensor | None) -> Kernel:
    """Weight-only int4 for few tokens: the weight is read once, as it is packed.

    For a weight that is not in `Layout.BLOCKS` it is `bind_dequantized`.
    """
    if weight.layout is not Layout.BLOCKS:
        return bind_dequantized(weight, bias)
    values = weight.packed.view(weight.n_out, -1)
    scale_zero, group_size = weight.scale_zero, weight.group_size
    packed = torch._weight_int4pack_mm_for_cpu

    def int4_packed(x: Tensor) -> Tensor:
        y = packed(x.contiguous(), values, group_size, scale_zero)
        return y if bias is None else y.add_(bias)

    return int4_packed


def bind_dequantized(weight: GroupWeight, bias: Tensor | None) -> Kernel:
    """Weight-only int4 or int3 for many tokens: widen some rows to bf16, multiply, go on."""
    n_out = weight.n_out
    step = max(BLOCK_ROWS, SCRATCH_ELEMENTS // max(1, weight.n_in) // BLOCK_ROWS * BLOCK_ROWS)
    linear = torch.nn.functional.linear

    def dequantized(x: Tensor) -> Tensor:
        y = x.new_empty((x.shape[0], n_out))
        for first in range(0, n_out, step):
            end = min(n_out, first + step)
            y[:, first:end] = linear(x, weight.dequantize(x.dtype, first, end))
        return y if bias is None else y.add_(bias)

    return dequantized


def quantize_kv(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax over the last dimension, round to nearest: `reference.quantize_kv` in fewer passes.

    The scale is rounded to bf16 first, and the integers are computed with the rounded one: at most
    half of it is lost on each element. A vector with a NaN or an infinity has a scale that is one,
    too: damage has to show in the logits.

    Args:
        x: [..., D] floating, any strides.
    Returns:
        int8 [..., D] and scales [...] bf16, positive.
    """
    absmax = x.abs().amax(-1, keepdim=True).float()
    scale = absmax.div_(INT8_MAX).to(torch.bfloat16)
    scale.clamp_min_(torch.finfo(torch.bfloat16).tiny)  # a vector of zeros stays one
    wide = x.to(torch.float32, copy=True)
    return wide.div_(scale).round_().to(torch.int8), scale.squeeze(-1)

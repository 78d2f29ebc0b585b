"""What every kernel computes, in plain torch. The reference is the specification.

T tokens, N output features, K input features. Given fp64 inputs it computes in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.formats import OUTLIER_THRESHOLD
from tightfit.kernels.groups import GroupWeight
from tightfit.kernels.weights import INT8_MAX, Int8Weight


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """Weight-only int8: x [T, K] times the dequantised weight, in x's dtype, [T, N]."""
    y = x @ weight.dequantize(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def group_linear(x: Tensor, weight: GroupWeight, bias: Tensor | None = None) -> Tensor:
    """Weight-only int4 or int3: x [T, K] times the dequantised weight, in x's dtype, [T, N]."""
    y = x @ weight.dequantize(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)


def quantize_input(
    x: Tensor, threshold: float = OUTLIER_THRESHOLD
) -> tuple[Tensor, Tensor, Tensor]:
    """x as LLM.int8() multiplies it; computed in fp32, whatever x's dtype is.

    A column k is an outlier when any |x[:, k]| reaches the threshold. The other columns are
    quantised row by row with their own absmax.

    Args:
        x: [T, K] floating, finite.
    Returns:
        x8 [T, K] int8, rounded half to even and 0 in outlier columns; its scale [T] fp32; the
        outlier columns' indices in ascending order.
    """
    outlier = (x.abs() >= threshold).any(dim=0)
    regular = x.float().masked_fill(outlier, 0.0)
    greatest = regular.abs().amax(dim=1)
    # By a tensor: by a number CUDA multiplies with its reciprocal, which rounds twice.
    scale = greatest / torch.full_like(greatest, INT8_MAX)
    scale.masked_fill_(scale == 0, 1.0)
    x8 = (regular / scale[:, None]).round().to(torch.int8)
    return x8, scale, outlier.nonzero().view(-1)


def llm_int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """LLM.int8(): outlier feature columns in x's precision, the rest in int8 × int8 → int32.

    y = (x8 · w8ᵀ) · sx · sw + x_out · W_outᵀ + b, split by `quantize_input`.

    Args:
        x: [T, K] floating.
        weight: [N, K].
        bias: [N] or None.
    Returns:
        [T, N], dtype of x.
    """
    x8, scale, outliers = quantize_input(x, weight.outlier_threshold)
    dot = (x8.double() @ weight.values.double().T).to(x.dtype)  # exact: integers below 2^53
    y = dot * scale.to(x.dtype)[:, None] * weight.scale.to(x.dtype)
    y = y + x[:, outliers] @ weight.dequantize(x.dtype)[:, outliers].T
    return y if bias is None else y + bias.to(x.dtype)


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    is_rms: bool,
) -> tuple[Tensor, Tensor | None]:
    """The norm of x + residual over each row of [T, C], in x's dtype, and that sum."""
    total = x if residual is None else x + residual
    centred = total if is_rms else total - total.mean(-1, keepdim=True)
    y = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.to(y.dtype)
    return y if bias is None else y + bias.to(y.dtype), None if residual is None else total


ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def activate(x: Tensor, name: str, *, is_gated: bool) -> Tensor:
    """[T, W]: the activation of x [T, W], or of x[:, :W] times x[:, W:] for x [T, 2 · W]."""
    if not is_gated:
        return ACTIVATIONS[name](x)
    gate, up = x.chunk(2, -1)
    return ACTIVATIONS[name](gate) * up


def quantize_kv(kv: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric absmax of each head and token; computed in fp32, whatever kv's dtype is.

    The scale is rounded to bf16 first and the values are computed with the rounded one. Heads of
    zeros get scale 1, those that are not finite scale NaN.

    Args:
        kv: [..., D] floating.
    Returns:
        [..., D] int8, rounded half to even; scales [...] bf16.
    """
    wide = kv.float()
    greatest = wide.abs().amax(-1)
    scale = (greatest / torch.full_like(greatest, INT8_MAX)).to(torch.bfloat16)
    scale.masked_fill_(scale == 0, 1.0)
    is_finite = wide.isfinite().all(-1)
    scale.masked_fill_(~is_finite, float("nan"))
    values = (wide / scale.float()[..., None]).round().clamp(-INT8_MAX, INT8_MAX)
    return values.masked_fill(~is_finite[..., None], 0.0).to(torch.int8), scale


def write_kv(cache: Tensor, scales: Tensor | None, kv: Tensor, slots: Tensor) -> None:
    """kv [T, 2 · KV heads · D] into the slots [T] of a cache [2 · KV heads, slots, D], in place,
    quantised where there are scales [2 · KV heads, slots]; negative slots are skipped."""
    heads = kv.view(kv.shape[0], cache.shape[0], -1).transpose(0, 1)[:, slots >= 0]
    slots = slots[slots >= 0]
    if scales is None:
        cache[:, slots] = heads
    else:
        cache[:, slots], scales[:, slots] = quantize_kv(heads)


def paged_attention(
    query: Tensor,
    cache: Tensor,
    scales: Tensor | None,
    block_tables: Sequence[Sequence[int]],
    counts: Sequence[int],
    contexts: Sequence[int],
    *,
    num_kv_heads: int,
    head_dim: int,
    block_size: int,
    softmax_scale: float,
    slopes: Tensor | None = None,
) -> Tensor:
    """Causal attention of a micro-batch, one sequence after another, in query's dtype.

    Args:
        query: [T, H · D], the sequences' tokens in order.
        cache: [2 · KV heads, slots, D], keys first; slot = block id · block_size + offset.
        scales: [2 · KV heads, slots] of an int8 cache: value = int8 · scale; else None.
        block_tables, counts, contexts: of each sequence its blocks, its query tokens, and its
            tokens up to the last of these.
        softmax_scale: of the scores.
        slopes: [H], ALiBi's: slope · (key's position - query's) is added to the scores; or None.
    Returns:
        [T, H · D].
    """
    outs, row = [], 0
    for table, count, context in zip(block_tables, counts, contexts, strict=True):
        part, row = query[row : row + count], row + count
        slots = [table[p // block_size] * block_size + p % block_size for p in range(context)]
        kv = cache[:, slots].to(query.dtype)
        if scales is not None:
            kv = kv * scales[:, slots].to(query.dtype)[:, :, None]
        q = part.view(count, num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)  # [KV, group, t, D]
        keys, values = kv[:num_kv_heads, None], kv[num_kv_heads:, None]
        scores = q @ keys.transpose(-1, -2) * softmax_scale
        positions = torch.arange(context, device=query.device)
        distance = positions[None, :] - positions[context - count :, None]
        if slopes is not None:
            grouped = slopes.to(query.dtype).view(num_kv_heads, -1, 1, 1)
            scores = scores + grouped * distance.to(query.dtype)
        weights = scores.masked_fill(distance > 0, float("-inf")).softmax(-1)
        outs.append((weights @ values).permute(2, 0, 1, 3).reshape(count, -1))
    return torch.cat(outs)


def kept_tokens(weights: Tensor, *, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Mask [V] of the tokens that min-p, then top-k, then top-p leave of one row.

    Args:
        weights: [V], probabilities up to a factor, the largest 1; of equal ones the lower id ranks
            higher, and those of 0 are never left.
        top_k: tokens kept at most; 0 is off.
        top_p: share of the mass that is reached; from 1 on it is off.
        min_p: least weight kept; 0 is off.
    """
    ranked, order = weights.sort(descending=True, stable=True)
    is_kept = (ranked > 0) & (ranked >= min_p)
    if top_k > 0:
        is_kept[top_k:] = False
    if top_p < 1.0:
        mass = torch.where(is_kept, ranked, 0.0).cumsum(0, dtype=torch.float64)
        is_kept[1:] &= mass[:-1] < top_p * mass[-1]
    return torch.zeros_like(is_kept).scatter_(0, order, is_kept)


def draw_token(weights: Tensor, is_kept: Tensor, uniform: float) -> int:
    """The first id at which the kept tokens' running mass exceeds `uniform` times their total."""
    mass = torch.where(is_kept, weights, 0.0).cumsum(0, dtype=torch.float64)
    return int(torch.searchsorted(mass, mass[-1:] * uniform, right=True))

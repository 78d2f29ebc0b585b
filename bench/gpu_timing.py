"""What each kernel takes on this GPU, at the widths of BLOOM-176B and OPT-175B.

Every time is the median of five replays of a CUDA graph, which goes round several sets of operands
so that weights and caches come from memory. T tokens, N output features, K input features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tightfit.kernels.activation import activate
from tightfit.kernels.attention_plan import plan_attention
from tightfit.kernels.formats import TILE_FEATURES, TILE_PIECE, TILE_ROWS
from tightfit.kernels.groups import GroupWeight
from tightfit.kernels.kv_write import write_kv
from tightfit.kernels.llm_int8 import llm_int8_linear
from tightfit.kernels.norm import add_norm
from tightfit.kernels.packing import Layout
from tightfit.kernels.paged_attention import paged_attention
from tightfit.kernels.sampling import sample
from tightfit.kernels.w8a16 import w8a16_linear
from tightfit.kernels.weights import Int8Weight
from tightfit.kernels.wxa16 import wxa16_linear

DEVICE, DTYPE = "cuda", torch.bfloat16
REPLAYS, CALLS, SETS = 5, 8, 3
GROUP_SIZE, BLOCK_SIZE, HEAD_DIM = 128, 16, 128
LAYERS = {
    "BLOOM-176B": {
        "qkv": (43_008, 14_336), "attn_out": (14_336, 14_336), "mlp_up": (57_344, 14_336),
        "mlp_down": (14_336, 57_344),
    },
    "OPT-175B": {
        "qkv": (36_864, 12_288), "attn_out": (12_288, 12_288), "mlp_up": (49_152, 12_288),
        "mlp_down": (12_288, 49_152),
    },
}  # fmt: skip
"""(N, K) of a block's linear layers."""
HEADS = {"BLOOM-176B": (112, 112), "OPT-175B": (96, 96), "Llama-like": (64, 8)}
"""(heads, KV heads), of 128 features."""
Call = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One kernel at one size."""

    kernel: str
    shape: str
    tokens: int
    us: float
    gb_per_s: float | None = None
    """Of the operands that have to be read once: weights, or keys and values."""
    speedup: float | None = None
    """Over cuBLAS with a bf16 weight of the same shape."""
    error: float | None = None
    """‖y - exact‖ / ‖exact‖, exact with the same integers in fp32."""


def microseconds(calls: Sequence[Call]) -> float:
    """Of one call."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            calls[i % len(calls)]()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / CALLS)
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """What this GPU reaches: copying (GB/s, read and written), and multiplying bf16 (TFLOP/s)."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE).random_()
    target = torch.empty_like(source)
    copy_us = microseconds([lambda: target.copy_(source)])
    a, b = (torch.randn(8192, 8192, dtype=DTYPE, device=DEVICE) for _ in range(2))
    product_us = microseconds([lambda: a @ b])
    return {
        "copy_gb_per_s": 2 * source.numel() / copy_us / 1e3,
        "bf16_tflop_per_s": 2 * 8192**3 / product_us / 1e6,
    }


def _int8(n_out: int, n_in: int) -> Int8Weight:
    values = torch.randint(-127, 128, (n_out, n_in), dtype=torch.int8, device=DEVICE)
    scale = torch.rand(n_out, device=DEVICE).mul_(1e-4).add_(1e-4).to(torch.bfloat16)
    return Int8Weight(values=values, scale=scale)


def _groups(bits: int, n_out: int, n_in: int) -> GroupWeight:
    rows, tiles = -(-n_out // TILE_ROWS), -(-n_in // TILE_FEATURES[bits])
    if bits == 4:
        shape, dtype, highest = (rows, tiles, TILE_ROWS, TILE_PIECE), torch.int16, 2**15
    else:
        shape, dtype, highest = (rows, tiles, 3, TILE_ROWS, TILE_PIECE), torch.uint8, 2**8
    lowest = -highest if bits == 4 else 0
    pairs = torch.rand(n_in // GROUP_SIZE, n_out, 2, device=DEVICE).mul_(1e-2)
    pairs[..., 1] -= 5e-3
    return GroupWeight(
        bits=bits,
        n_in=n_in,
        group_size=GROUP_SIZE,
        layout=Layout.TILES,
        packed=torch.randint(lowest, highest, shape, dtype=dtype, device=DEVICE),
        scale_zero=pairs.to(torch.bfloat16),
    )


def linears(
    model: str, names: Sequence[str], token_counts: Sequence[int], formats: Sequence[str]
) -> Iterator[Timing]:
    """The linear layers of a block, beside cuBLAS."""
    make: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
        "int8": (_int8, w8a16_linear), "llm_int8": (_int8, llm_int8_linear),
        "int4": (partial(_groups, 4), wxa16_linear), "int3": (partial(_groups, 3), wxa16_linear),
    }  # fmt: skip
    for name in names:
        n_out, n_in = LAYERS[model][name]
        shape = f"{model} {name} {n_out} × {n_in}"
        inputs = {t: torch.randn(t, n_in, dtype=DTYPE, device=DEVICE) for t in token_counts}
        dense = [torch.randn(n_out, n_in, dtype=DTYPE, device=DEVICE) for _ in range(2)]
        cublas = {}
        for t, x in inputs.items():
            cublas[t] = microseconds([partial(torch.nn.functional.linear, x, w) for w in dense])
            yield Timing(
                kernel="cuBLAS bf16", shape=shape, tokens=t, us=cublas[t],
                gb_per_s=dense[0].nbytes / cublas[t] / 1e3,
            )  # fmt: skip
        del dense
        for fmt in formats:
            build, linear = make[fmt]
            weights = [build(n_out, n_in) for _ in range(SETS)]
            for t, x in inputs.items():
                if fmt == "llm_int8" and t < 16:
                    continue  # few tokens run as int8 does
                us = microseconds([partial(linear, x, w) for w in weights])
                yield Timing(
                    kernel=fmt, shape=shape, tokens=t, us=us,
                    gb_per_s=weights[0].nbytes / us / 1e3, speedup=cublas[t] / us,
                    error=_error(linear(x, weights[0]), x, weights[0]),
                )  # fmt: skip


def _error(y: Tensor, x: Tensor, weight: Int8Weight | GroupWeight, rows: int = 512) -> float:
    """Of the first rows of the weight."""
    if isinstance(weight, GroupWeight):
        wide = weight.dequantize(torch.float32, 0, rows)
    else:
        wide = weight.values[:rows].float() * weight.scale[:rows].float()[:, None]
    exact = x.float() @ wide.T
    return float((y[:, :rows].float() - exact).norm() / exact.norm())


def attention(model: str, batch: int, context: int, *, is_int8: bool) -> Timing:
    """Decodes of a batch at one context."""
    heads, kv_heads = HEADS[model]
    blocks = context // BLOCK_SIZE
    slots = batch * context
    shape = (2 * kv_heads, slots, HEAD_DIM)
    caches = []
    for _ in range(2):
        if is_int8:
            caches.append(torch.randint(-127, 128, shape, dtype=torch.int8, device=DEVICE))
        else:
            caches.append(torch.randn(shape, dtype=DTYPE, device=DEVICE))
    scales = torch.rand(shape[:2], device=DEVICE).mul_(1e-2).to(DTYPE) if is_int8 else None
    order = torch.randperm(batch * blocks).tolist()
    plan = plan_attention(
        [order[i * blocks : (i + 1) * blocks] for i in range(batch)], [1] * batch,
        [context] * batch, block_size=BLOCK_SIZE, device=DEVICE,
    )  # fmt: skip
    query = torch.randn(batch, heads * HEAD_DIM, dtype=DTYPE, device=DEVICE)
    sizes = {"num_kv_heads": kv_heads, "head_dim": HEAD_DIM, "block_size": BLOCK_SIZE}
    us = microseconds(
        [
            partial(paged_attention, query, cache, scales, plan, softmax_scale=0.09, **sizes)
            for cache in caches
        ]
    )
    size = caches[0].nbytes + (0 if scales is None else scales.nbytes)
    return Timing(
        kernel=f"attention, {'int8' if is_int8 else 'bf16'} KV",
        shape=f"{model}, {batch} × {context}", tokens=batch, us=us, gb_per_s=size / us / 1e3,
    )  # fmt: skip


def chunk_attention(model: str, tokens: int, context: int) -> Timing:
    """A chunk of one sequence; `gb_per_s` is none, as arithmetic is the bound."""
    heads, kv_heads = HEADS[model]
    plan = plan_attention(
        [list(range(context // BLOCK_SIZE))], [tokens], [context], block_size=BLOCK_SIZE,
        device=DEVICE,
    )  # fmt: skip
    cache = torch.randn(2 * kv_heads, context, HEAD_DIM, dtype=DTYPE, device=DEVICE)
    query = torch.randn(tokens, heads * HEAD_DIM, dtype=DTYPE, device=DEVICE)
    us = microseconds(
        [
            partial(
                paged_attention, query, cache, None, plan, num_kv_heads=kv_heads,
                head_dim=HEAD_DIM, block_size=BLOCK_SIZE, softmax_scale=0.09,
            )
        ]
    )  # fmt: skip
    return Timing(
        kernel="attention of a chunk", shape=f"{model}, up to {context}", tokens=tokens, us=us
    )


def others(tokens: int) -> Iterator[Timing]:
    """What lies between the linear layers, at BLOOM-176B's width, and sampling."""
    width, vocabulary = 14_336, 250_880
    x, residual = (torch.randn(tokens, width, dtype=DTYPE, device=DEVICE) for _ in range(2))
    vector = torch.randn(width, dtype=DTYPE, device=DEVICE)
    norm = partial(add_norm, x, residual, vector, vector, eps=1e-5, is_rms=False)
    yield Timing(kernel="norm + residual", shape=str(width), tokens=tokens, us=microseconds([norm]))
    up = torch.randn(tokens, 4 * width, dtype=DTYPE, device=DEVICE)
    act = partial(activate, up, "gelu_tanh", is_gated=False)
    yield Timing(kernel="gelu_tanh", shape=str(4 * width), tokens=tokens, us=microseconds([act]))
    kv = torch.randn(tokens, 2 * width, dtype=DTYPE, device=DEVICE)
    slots = torch.arange(tokens, device=DEVICE)
    cache = torch.zeros(224, 4096, HEAD_DIM, dtype=torch.int8, device=DEVICE)
    scales = torch.zeros(224, 4096, dtype=DTYPE, device=DEVICE)
    write = partial(write_kv, cache, scales, kv, slots)
    yield Timing(kernel="write int8 KV", shape="112 heads", tokens=tokens, us=microseconds([write]))
    if tokens > 64:
        return
    logits = torch.randn(tokens, vocabulary, device=DEVICE)
    numbers = {
        "temperature": torch.full((tokens,), 0.8, device=DEVICE),
        "top_k": torch.full((tokens,), 50, dtype=torch.int32, device=DEVICE),
        "top_p": torch.full((tokens,), 0.95, dtype=torch.float64, device=DEVICE),
        "min_p": torch.zeros(tokens, device=DEVICE),
        "uniform": torch.rand(tokens, dtype=torch.float64, device=DEVICE),
    }
    draw = partial(sample, logits, **numbers)
    yield Timing(
        kernel="sample, top-k and top-p", shape=str(vocabulary), tokens=tokens,
        us=microseconds([draw]),
    )  # fmt: skip

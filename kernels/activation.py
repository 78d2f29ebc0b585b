"""Activations of the MLP, alone or as a gate's, in one pass over memory.

    gated:    y[t, j] = f(x[t, j]) · x[t, W + j]         x [T, 2 · W], gate first, then up
    ungated:  y[t, j] = f(x[t, j])                       x [T, W]

    relu       f(a) = max(a, 0)
    gelu       f(a) = a · (1 + erf(a / √2)) / 2          (arXiv 1606.08415)
    gelu_tanh  f(a) = a · (1 + tanh(√(2/π) · (a + 0.044715 · a³))) / 2, as BLOOM and GPT-2 have it
    silu       f(a) = a · σ(a)

T tokens, W width. x and y fp16, bf16 or fp32. All is computed in fp32 and rounded once, when y is
written: torch's two operators round twice. (1 + tanh(u)) / 2 is taken as σ(2u), and σ from
e^-|u|, which cannot overflow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Case

SUPPORTED_DTYPES: Final = (torch.float16, torch.bfloat16, torch.float32)
SUPPORTED_ACTIVATIONS: Final = ("relu", "gelu", "gelu_tanh", "silu")
"""Names as in a model's configuration."""

MAX_WIDTH: Final = 2**26
"""Keeps the second axis of the grid within CUDA's 65,535."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How one launch is cut up."""

    block: int
    """Values of one row in a program."""
    num_warps: int


def choose_tile(itemsize: int) -> Tile:
    """16 bytes in each of 128 threads, so that one token's row already makes many programs.

    Args:
        itemsize: bytes of a value.
    """
    return Tile(block=128 * 16 // itemsize, num_warps=4)


@triton.jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, e, 1.0) / (1.0 + e)


@triton.jit  # type: ignore[untyped-decorator]
def _activate(x, NAME: tl.constexpr):  # type: ignore[no-untyped-def]
    if NAME == "relu":
        y = tl.where(x < 0.0, 0.0, x)  # NaN stays NaN
    elif NAME == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))  # √½
    elif NAME == "gelu_tanh":
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 2 · √(2/π)
    else:
        tl.static_assert(NAME == "silu")
        y = x * _sigmoid(x)
    return y


@triton.jit  # type: ignore[untyped-decorator]
def _activation_kernel(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr,
    W,
    stride_x,
    NAME: tl.constexpr, IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A part of one row; y is contiguous."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < W
    x_ptrs = x_ptr + row * stride_x + cols
    y = _activate(tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32), NAME)
    if IS_GATED:
        y *= tl.load(x_ptrs + W, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * W + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


def activate(x: Tensor, name: str, *, is_gated: bool) -> Tensor:
    """An activation, times its up projection if gated; see `reference.activate`.

    Args:
        x: [T, 2 · W], gate first, then up, if gated, else [T, W]; fp16, bf16 or fp32; rows may be a
            slice of wider ones; not changed.
        name: one of `SUPPORTED_ACTIVATIONS`.
        is_gated: x has a gate and an up projection.
    Returns:
        [T, W] of x's dtype, new and contiguous.
    Raises:
        ValueError: shape, dtype or name do not fit.
    """
    if name not in SUPPORTED_ACTIVATIONS:
        raise ValueError(f"name must be one of {SUPPORTED_ACTIVATIONS}, got {name!r}")
    parts = 2 if is_gated else 1
    wanted = "[T, 2 · W]" if is_gated else "[T, W]"
    if x.ndim != 2 or x.shape[1] % parts or x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"x must be {wanted} in one of {SUPPORTED_DTYPES}, got {list(x.shape)} {x.dtype}"
        )
    n_tokens, width = x.shape[0], x.shape[1] // parts
    if width > MAX_WIDTH:
        raise ValueError(f"W must be at most {MAX_WIDTH}, got {width}")
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty((n_tokens, width))
    if y.numel() == 0:
        return y
    tile = choose_tile(x.itemsize)
    _activation_kernel[(n_tokens, triton.cdiv(width, tile.block))](
        x, y, width, x.stride(0),
        NAME=name, IS_GATED=is_gated, BLOCK=tile.block,
        num_warps=tile.num_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


ITEMSIZES: Final = {"fp16": 2, "bf16": 2, "fp32": 4}


def compile_cases() -> list[Case]:
    """Every variant in 16 bits, one in 32: one tile serves all widths."""
    return [
        *[
            _case(name, dtype, is_gated=is_gated)
            for name in SUPPORTED_ACTIVATIONS
            for dtype in ("fp16", "bf16")
            for is_gated in (False, True)
        ],
        _case("gelu", "fp32", is_gated=True),
    ]


def _case(name: str, dtype: str, *, is_gated: bool) -> Case:
    tile = choose_tile(ITEMSIZES[dtype])
    return Case(
        name=f"activation {name}{' gate' if is_gated else ''} {dtype}",
        kernel=_activation_kernel,
        types={"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "W": "i32", "stride_x": "i32"},
        constants={"NAME": name, "IS_GATED": is_gated, "BLOCK": tile.block},
        num_warps=tile.num_warps,
        has_dot=False,
        capabilities=CAPABILITIES if dtype == "bf16" else (*OLD_CAPABILITIES, *CAPABILITIES),
    )

"""The ops of each format on a GPU. Imports Triton.

Few tokens are a matter of memory: the kernels of `w8a16` and `wxa16` read the weight once, as it is
packed. With very many it pays to dequantise the weight, a block of rows at a time, and to leave the
product to cuBLAS; for `llm_int8` many tokens are LLM.int8()'s own product. From how many tokens on
is measured at load.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.kernels.formats import Format
from tightfit.kernels.groups import GroupWeight, Quantized, pack_groups, quantize_groups
from tightfit.kernels.llm_int8 import llm_int8_linear
from tightfit.kernels.ops import Kernel, OpPair, dense_ops, hold_int8, pack_int8
from tightfit.kernels.packing import Layout
from tightfit.kernels.w8a16 import dequantized_linear as dequantized_int8
from tightfit.kernels.w8a16 import w8a16_linear
from tightfit.kernels.wxa16 import dequantized_linear as dequantized_groups
from tightfit.kernels.wxa16 import wxa16_linear


def _bind(linear: Callable[[Tensor, Any, Tensor | None], Tensor]) -> Callable[..., Kernel]:
    def bind(weight: Any, bias: Tensor | None) -> Kernel:
        return lambda x: linear(x, weight, bias)

    return bind


def _pack_groups(bits: int) -> Callable[[Tensor, int | None, str], GroupWeight]:
    def pack(weight: Tensor, group_size: int | None, device: str) -> GroupWeight:
        return quantize_groups(
            weight, bits=bits, group_size=group_size, layout=Layout.TILES, device=device
        )

    return pack


def _hold_groups(weight: Quantized) -> GroupWeight:
    return pack_groups(weight, layout=Layout.TILES)


def _group_ops(bits: int) -> OpPair[GroupWeight]:
    return OpPair(
        pack=_pack_groups(bits),
        hold=_hold_groups,
        few=_bind(wxa16_linear),
        many=_bind(dequantized_groups),
    )


OPS: Final[dict[Format, OpPair[Any]]] = {
    Format.FP32: dense_ops(torch.float32),
    Format.BF16: dense_ops(torch.bfloat16),
    Format.INT8: OpPair(
        pack=pack_int8, hold=hold_int8, few=_bind(w8a16_linear), many=_bind(dequantized_int8)
    ),
    Format.LLM_INT8: OpPair(
        pack=pack_int8, hold=hold_int8, few=_bind(w8a16_linear), many=_bind(llm_int8_linear)
    ),
    Format.INT4: _group_ops(4),
    Format.INT3: _group_ops(3),
}

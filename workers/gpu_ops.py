"""What a block does between its linear layers, on a GPU, by Triton kernels. Imports Triton.

T tokens, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.kernels.activation import activate
from tightfit.kernels.formats import OLDEST_CAPABILITY
from tightfit.kernels.kv_write import write_kv
from tightfit.kernels.norm import add_norm
from tightfit.kernels.paged_attention import paged_attention
from tightfit.kernels.paged_tiles import HEAD_DIM_STEP, MAX_HEAD_DIM
from tightfit.workers.batch import BatchInputs
from tightfit.workers.decoder_config import DecoderConfig, Norm, Position
from tightfit.workers.errors import UnsupportedModelError
from tightfit.workers.kv_cache import KVCache
from tightfit.workers.positions import alibi_slopes


def check_gpu(config: DecoderConfig, device: str, dtype: torch.dtype) -> None:
    """Raise UnsupportedModelError where this model cannot be computed on this GPU."""
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        raise UnsupportedModelError(
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}."
            f"{capability[1]}; stages compute in bf16, which wants 8.0 (A100) or later"
        )
    if dtype is not torch.bfloat16:
        raise UnsupportedModelError(f"on a GPU stages compute in bf16, not in {dtype}")
    if config.head_dim % HEAD_DIM_STEP or config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedModelError(
            f"config.json: heads of {config.head_dim} features; on a GPU they have a multiple of "
            f"{HEAD_DIM_STEP}, at most {MAX_HEAD_DIM}"
        )


class GpuNorm:
    """LayerNorm or RMSNorm over [T, hidden_size], with the addition of a residual before it."""

    __slots__ = ("_bias", "_eps", "_is_rms", "_weight")

    def __init__(self, config: DecoderConfig, weight: Tensor | None, bias: Tensor | None) -> None:
        self._is_rms, self._eps = config.norm is Norm.RMS, config.norm_eps
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] → the same shape and dtype, as a new tensor."""
        y, _ = add_norm(x, None, self._weight, self._bias, eps=self._eps, is_rms=self._is_rms)
        return y

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum, as new tensors."""
        y, total = add_norm(
            x, residual, self._weight, self._bias, eps=self._eps, is_rms=self._is_rms
        )
        assert total is not None
        return y, total

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return sum(t.nbytes for t in (self._weight, self._bias) if t is not None)


class GpuActivation:
    """The MLP's activation, times the up projection where there is a gate."""

    def __init__(self, config: DecoderConfig) -> None:
        self._name, self._is_gated = config.activation.value, config.gated_mlp

    def __call__(self, up: Tensor) -> Tensor:
        """[T, gate and up, or up] → [T, intermediate size]."""
        return activate(up, self._name, is_gated=self._is_gated)


class GpuAttention:
    """Attention on the paged cache, all sequences of a micro-batch together."""

    def __init__(self, config: DecoderConfig, device: str) -> None:
        self._config, self._scale = config, config.head_dim**-0.5
        is_alibi = config.position is Position.ALIBI
        self._slopes = alibi_slopes(config.num_heads).to(device) if is_alibi else None

    def __call__(
        self, query: Tensor, kv: Tensor, inputs: BatchInputs, cache: KVCache, layer: int
    ) -> Tensor:
        """See `cpu_ops.CpuAttention`."""
        assert inputs.plan is not None
        keys_values, scales = cache.storage(layer)
        write_kv(keys_values, scales, kv, inputs.slots)
        return paged_attention(
            query,
            keys_values,
            scales,
            inputs.plan,
            num_kv_heads=self._config.num_kv_heads,
            head_dim=self._config.head_dim,
            block_size=cache.block_size,
            softmax_scale=self._scale,
            slopes=self._slopes,
        )

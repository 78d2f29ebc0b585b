"""One configured transformer block. T tokens, H heads, D head size.

The block is a plain object, not an `nn.Module`: a decode step of a small model is bound by Python
and operator overhead, and nothing here is ever trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tightfit.kernels.dispatch import Linear
from tightfit.workers.batch import BatchInputs
from tightfit.workers.cpu_ops import CpuActivation, CpuAttention, CpuNorm
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.kv_cache import KVCache


class NormLayer(Protocol):
    """A norm over [T, hidden_size], its moments in fp32."""

    def __call__(self, x: Tensor) -> Tensor:
        """The norm of x, as a new tensor."""

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; `x` may be overwritten."""

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockOps:
    """What a block does between its linear layers, on one device."""

    norm: Callable[[Tensor | None, Tensor | None], NormLayer]
    """(weight, bias) → a norm."""
    activation: Callable[[Tensor], Tensor]
    """As `CpuActivation`."""
    attention: Callable[[Tensor, Tensor, BatchInputs, KVCache, int], Tensor]
    """As `CpuAttention`."""


def block_ops(config: DecoderConfig, device: str, dtype: torch.dtype) -> BlockOps:
    """Those of a model on a device, for hidden states of a dtype.

    Raises:
        UnsupportedModelError: the GPU cannot compute this model.
    """
    if device.startswith("cuda"):
        from tightfit.workers import gpu_ops  # imports Triton, which a CPU host need not have

        gpu_ops.check_gpu(config, device, dtype)
        return BlockOps(
            norm=lambda weight, bias: gpu_ops.GpuNorm(config, weight, bias),
            activation=gpu_ops.GpuActivation(config),
            attention=gpu_ops.GpuAttention(config, device),
        )
    return BlockOps(
        norm=lambda weight, bias: CpuNorm(config, weight, bias),
        activation=CpuActivation(config),
        attention=CpuAttention(config),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWeights:
    """What one block holds."""

    attn_norm: NormLayer
    qkv: Linear
    """Rows: all query heads, all key heads, all value heads."""
    attn_out: Linear
    mlp_norm: NormLayer
    mlp_up: Linear
    """Rows: gate (if any), then up."""
    mlp_down: Linear

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(
            part.nbytes
            for part in (
                self.attn_norm, self.qkv, self.attn_out, self.mlp_norm, self.mlp_up, self.mlp_down,
            )
        )  # fmt: skip


class DecoderLayer:
    """One block: attention on the paged cache, then the MLP, each with its norm and residual.

    Args:
        config: the model.
        weights: this layer's.
        index: of this layer within the shard's cache.
        ops: of the device.
    """

    __slots__ = ("_config", "_index", "_ops", "_split", "weights")

    def __init__(
        self, config: DecoderConfig, weights: LayerWeights, index: int, ops: BlockOps
    ) -> None:
        self._config, self._index, self._ops, self.weights = config, index, ops, weights
        self._split = config.num_heads * config.head_dim

    def __call__(self, x: Tensor, inputs: BatchInputs, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden_size] in, the same out; `x` is overwritten."""
        w, config = self.weights, self._config
        if config.pre_norm:
            normed = w.attn_norm(x)
            attended = self._attention(normed, inputs, cache)
            normed, x = w.mlp_norm.add(attended, normed if config.residual_from_norm else x)
            return self._mlp(normed).add_(normed if config.residual_from_norm else x)
        x, _ = w.attn_norm.add(self._attention(x, inputs, cache), x)
        return w.mlp_norm.add(self._mlp(x), x)[0]

    def _mlp(self, x: Tensor) -> Tensor:
        return self.weights.mlp_down(self._ops.activation(self.weights.mlp_up(x)))

    def _attention(self, x: Tensor, inputs: BatchInputs, cache: KVCache) -> Tensor:
        config, split = self._config, self._split
        qkv = self.weights.qkv(x)
        if inputs.cos is not None and inputs.sin is not None:
            rotated = config.num_heads + config.num_kv_heads
            qk = qkv[:, : rotated * config.head_dim].view(-1, rotated, config.head_dim)
            turned = qk.roll(config.head_dim // 2, -1)
            qk.mul_(inputs.cos).addcmul_(turned, inputs.sin)
        attended = self._ops.attention(qkv[:, :split], qkv[:, split:], inputs, cache, self._index)
        return self.weights.attn_out(attended)

"""One configured transformer block. T tokens, H heads, D head size.

The block is a plain object, not an `nn.Module`: a decode step of a small model is bound by Python
and operator overhead, and nothing here is ever trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.dispatch import Linear
from tightfit.workers.batch import AttentionGroup, BatchInputs
from tightfit.workers.decoder_config import Activation, DecoderConfig, Norm
from tightfit.workers.kv_cache import KVCache

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: torch.relu_,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
}


class NormLayer:
    """LayerNorm or RMSNorm over [T, hidden_size]."""

    __slots__ = ("_bias", "_eps", "_rms", "_shape", "_weight")

    def __init__(self, config: DecoderConfig, weight: Tensor | None, bias: Tensor | None) -> None:
        self._rms = config.norm is Norm.RMS
        self._eps, self._shape = config.norm_eps, (config.hidden_size,)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        if self._rms:
            return F.rms_norm(x, self._shape, self._weight, self._eps)
        return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return sum(t.nbytes for t in (self._weight, self._bias) if t is not None)


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
    """

    __slots__ = ("_act", "_config", "_index", "_split", "weights")

    def __init__(self, config: DecoderConfig, weights: LayerWeights, index: int) -> None:
        self._config, self._index, self.weights = config, index, weights
        self._act = ACTIVATIONS[config.activation]
        self._split = config.num_heads * config.head_dim

    def __call__(self, x: Tensor, inputs: BatchInputs, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden_size] in, the same out; `x` is overwritten."""
        w, config = self.weights, self._config
        if config.pre_norm:
            normed = w.attn_norm(x)
            attended = self._attention(normed, inputs, cache)
            x = attended.add_(normed if config.residual_from_norm else x)
            normed = w.mlp_norm(x)
            return self._mlp(normed).add_(normed if config.residual_from_norm else x)
        x = w.attn_norm(self._attention(x, inputs, cache).add_(x))
        return w.mlp_norm(self._mlp(x).add_(x))

    def _mlp(self, x: Tensor) -> Tensor:
        up = self.weights.mlp_up(x)
        if self._config.gated_mlp:
            width = self._config.intermediate_size
            return self.weights.mlp_down(self._act(up[:, :width]).mul_(up[:, width:]))
        return self.weights.mlp_down(self._act(up))

    def _attention(self, x: Tensor, inputs: BatchInputs, cache: KVCache) -> Tensor:
        config, split = self._config, self._split
        qkv = self.weights.qkv(x)
        if inputs.cos is not None and inputs.sin is not None:
            rotated = config.num_heads + config.num_kv_heads
            qk = qkv[:, : rotated * config.head_dim].view(-1, rotated, config.head_dim)
            turned = qk.roll(config.head_dim // 2, -1)
            qk.mul_(inputs.cos).addcmul_(turned, inputs.sin)
        cache.write(self._index, inputs.slots, qkv[:, split:])
        query = qkv[:, :split]
        if len(inputs.groups) == 1:
            return self.weights.attn_out(self._attend(query, inputs.groups[0], cache))
        out = torch.empty_like(query)
        for group in inputs.groups:
            out[group.rows] = self._attend(query[group.rows], group, cache)
        return self.weights.attn_out(out)

    def _attend(self, query: Tensor, group: AttentionGroup, cache: KVCache) -> Tensor:
        """Attention of one group: query [rows, H · D] → [rows, H · D]."""
        if group.first_slot is not None:
            keys, values = cache.window(self._index, group.first_slot, group.context)
        else:
            keys, values = cache.gather(self._index, group.blocks, group.num_sequences)
            keys, values = keys[:, :, : group.context], values[:, :, : group.context]
        heads, kv_heads, size = (
            self._config.num_heads, self._config.num_kv_heads, self._config.head_dim,
        )  # fmt: skip
        if group.num_queries == 1:
            # The heads that share a KV head stand where queries stand: nothing is repeated.
            q = query.view(group.num_sequences, kv_heads, heads // kv_heads, size)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask)
            return out.reshape(group.num_sequences, heads * size)
        q = query.view(1, group.num_queries, heads, size).transpose(1, 2)
        if kv_heads != heads:
            keys = keys.repeat_interleave(heads // kv_heads, dim=1)
            values = values.repeat_interleave(heads // kv_heads, dim=1)
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=group.mask, is_causal=group.causal
        )
        return out.transpose(1, 2).reshape(group.num_queries, heads * size)

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
from tightfit.workers.batch import AttentionGroup, BatchInputs, DecodeGroup, FusedGroup
from tightfit.workers.decoder_config import Activation, DecoderConfig, Norm
from tightfit.workers.kv_cache import KVCache

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: torch.relu_,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
}


class NormLayer:
    """LayerNorm or RMSNorm over [T, hidden_size], its moments in fp32.

    torch has no RMSNorm in one piece on the CPU: `F.rms_norm` is eight operators there.
    """

    __slots__ = ("_bias", "_doubled", "_eps", "_eps_tensor", "_rms", "_shape", "_weight")

    def __init__(self, config: DecoderConfig, weight: Tensor | None, bias: Tensor | None) -> None:
        self._rms = config.norm is Norm.RMS
        self._eps, self._eps_tensor = config.norm_eps, torch.tensor([[config.norm_eps]])
        self._shape, self._doubled = (config.hidden_size,), (2 * config.hidden_size,)
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden_size] → the same shape and dtype, as a new tensor."""
        if not self._rms:
            return F.layer_norm(x, self._shape, self._weight, self._bias, self._eps)
        y = self._scaled_row(x) if x.shape[0] == 1 else self._scaled(x)
        return y if self._weight is None else y.mul_(self._weight)

    def _scaled_row(self, x: Tensor) -> Tensor:
        """x / √(mean(x²) + ε) of one row, where every operator's start counts.

        [x, -x] has mean 0 and variance mean(x²): its LayerNorm, which torch has in one piece, is
        x's RMSNorm. It halves the time of a decode step's norms.
        """
        both = torch.cat((x, x.neg()), 1)
        return F.layer_norm(both, self._doubled, None, None, self._eps)[:, : self._shape[0]]

    def _scaled(self, x: Tensor) -> Tensor:
        """The same of any number of rows."""
        wide = x.float()
        length = torch.linalg.vector_norm(wide, 2, -1, True)
        mean_square = torch.addcmul(self._eps_tensor, length, length, value=1 / self._shape[0])
        return torch.mul(wide, mean_square.rsqrt_()).to(x.dtype)

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

    __slots__ = ("_act", "_config", "_index", "_scale", "_split", "weights")

    def __init__(self, config: DecoderConfig, weights: LayerWeights, index: int) -> None:
        self._config, self._index, self.weights = config, index, weights
        self._act = ACTIVATIONS[config.activation]
        self._split = config.num_heads * config.head_dim
        self._scale = config.head_dim**-0.5

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
        if isinstance(group, FusedGroup):
            return self._attend_fused(query, group, cache)
        return self._attend_decodes(query, group, cache)

    def _attend_fused(self, query: Tensor, group: FusedGroup, cache: KVCache) -> Tensor:
        config, num = self._config, group.num_queries
        if group.first_slot is not None:
            keys, values = cache.window(self._index, group.first_slot, group.context)
        else:
            keys, values = cache.gather(self._index, group.blocks)
            keys, values = keys[None, :, : group.context], values[None, :, : group.context]
        # The heads that share a KV head stand where queries stand: nothing is repeated.
        q = query.view(num, config.num_kv_heads, -1, config.head_dim)
        if num > 1:
            q = q.permute(1, 2, 0, 3).reshape(1, config.num_kv_heads, -1, config.head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask)
        if num > 1:
            out = out.view(config.num_kv_heads, -1, num, config.head_dim).permute(2, 0, 1, 3)
        return out.reshape(num, -1)

    def _attend_decodes(self, query: Tensor, group: DecodeGroup, cache: KVCache) -> Tensor:
        """One query token per sequence; the heads that share a KV head stand where queries do."""
        config = self._config
        repeats = config.num_heads // config.num_kv_heads
        pairs = query.reshape(-1, repeats, config.head_dim)  # [B · KV heads, queries, D]
        outs = []
        for part in group.parts:
            q = pairs[part.pairs]
            if part.fused:
                keys, values = cache.gather(self._index, part.blocks)
                out = F.scaled_dot_product_attention(
                    q[None], keys[None], values[None], attn_mask=part.mask[None]
                )
            else:
                keys, values, scales = cache.gather_unscaled(self._index, part.blocks)
                scores = torch.bmm(q, keys.transpose(1, 2))
                if scales is None:
                    weights = torch.add(part.mask, scores, alpha=self._scale).softmax(-1)
                else:
                    scaled = torch.addcmul(part.mask, scores, scales[0], value=self._scale)
                    weights = scaled.softmax(-1).mul_(scales[1])
                out = torch.bmm(weights.to(values.dtype), values)
            outs.append(out.reshape(-1, repeats * config.head_dim))
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(query.shape)

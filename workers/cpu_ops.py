"""What a block does between its linear layers, on the CPU, in torch.

T tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.workers.batch import AttentionGroup, BatchInputs, DecodeGroup, FusedGroup
from tightfit.workers.decoder_config import Activation, DecoderConfig, Norm
from tightfit.workers.kv_cache import KVCache

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.RELU: torch.relu_,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    Activation.SILU: F.silu,
}


class CpuNorm:
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

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; `x` is overwritten."""
        total = x.add_(residual)
        return self(total), total

    @property
    def nbytes(self) -> int:
        """Bytes of weight and bias."""
        return sum(t.nbytes for t in (self._weight, self._bias) if t is not None)


class CpuActivation:
    """The MLP's activation, times the up projection where there is a gate."""

    def __init__(self, config: DecoderConfig) -> None:
        self._act = ACTIVATIONS[config.activation]
        self._width = config.intermediate_size if config.gated_mlp else None

    def __call__(self, up: Tensor) -> Tensor:
        """[T, gate and up, or up] → [T, intermediate size]; `up` is overwritten."""
        if self._width is None:
            return self._act(up)
        return self._act(up[:, : self._width]).mul_(up[:, self._width :])


class CpuAttention:
    """Attention on the paged cache, sequences of alike contexts together."""

    def __init__(self, config: DecoderConfig) -> None:
        self._config, self._scale = config, config.head_dim**-0.5

    def __call__(
        self, query: Tensor, kv: Tensor, inputs: BatchInputs, cache: KVCache, layer: int
    ) -> Tensor:
        """Store the micro-batch's keys and values, and attend to those of its sequences.

        Args:
            query: [T, H · D], rows may be strided.
            kv: [T, 2 · KV heads · D], keys first, rows may be strided.
            inputs: of the micro-batch.
            cache: of the shard.
            layer: index within it.
        Returns:
            [T, H · D].
        """
        cache.write(layer, inputs.slots, kv)
        if len(inputs.groups) == 1:
            return self._attend(query, inputs.groups[0], cache, layer)
        out = torch.empty_like(query)
        for group in inputs.groups:
            out[group.rows] = self._attend(query[group.rows], group, cache, layer)
        return out

    def _attend(self, query: Tensor, group: AttentionGroup, cache: KVCache, layer: int) -> Tensor:
        """Attention of one group: query [rows, H · D] → [rows, H · D]."""
        if isinstance(group, FusedGroup):
            return self._attend_fused(query, group, cache, layer)
        return self._attend_decodes(query, group, cache, layer)

    def _attend_fused(self, query: Tensor, group: FusedGroup, cache: KVCache, layer: int) -> Tensor:
        config, num = self._config, group.num_queries
        if group.first_slot is not None:
            keys, values = cache.window(layer, group.first_slot, group.context)
        else:
            keys, values = cache.gather(layer, group.blocks)
            keys, values = keys[None, :, : group.context], values[None, :, : group.context]
        # The heads that share a KV head stand where queries stand: nothing is repeated.
        q = query.view(num, config.num_kv_heads, -1, config.head_dim)
        if num > 1:
            q = q.permute(1, 2, 0, 3).reshape(1, config.num_kv_heads, -1, config.head_dim)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=group.mask)
        if num > 1:
            out = out.view(config.num_kv_heads, -1, num, config.head_dim).permute(2, 0, 1, 3)
        return out.reshape(num, -1)

    def _attend_decodes(
        self, query: Tensor, group: DecodeGroup, cache: KVCache, layer: int
    ) -> Tensor:
        """One query token per sequence; the heads that share a KV head stand where queries do."""
        config = self._config
        repeats = config.num_heads // config.num_kv_heads
        pairs = query.reshape(-1, repeats, config.head_dim)  # [B · KV heads, queries, D]
        # Into one tensor: small results that outlive the gathered pieces would lie between them in
        # the heap, and every piece would find room behind the last only (measured: 8 GB for 256
        # sequences).
        attended = torch.empty_like(pairs)
        for part in group.parts:
            q = pairs[part.pairs]
            if part.fused:
                keys, values = cache.gather(layer, part.blocks)
                out = F.scaled_dot_product_attention(
                    q[None], keys[None], values[None], attn_mask=part.mask[None]
                )
            else:
                keys, values, scales = cache.gather_unscaled(layer, part.blocks)
                scores = torch.bmm(q, keys.transpose(1, 2))
                if scales is None:
                    weights = torch.add(part.mask, scores, alpha=self._scale).softmax(-1)
                else:
                    scaled = torch.addcmul(part.mask, scores, scales[0], value=self._scale)
                    weights = scaled.softmax(-1).mul_(scales[1])
                out = torch.bmm(weights.to(values.dtype), values)
            attended[part.pairs] = out
        return attended.view(query.shape)

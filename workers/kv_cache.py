"""The paged KV cache of one shard.

A block holds keys and values of `block_size` consecutive tokens of one sequence; block ids are the
same on every stage and are owned by the scheduler. Keys and values lie together, [slot, 2, KV
heads, D], so that a layer writes and gathers them with one call each.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Blocks for `num_layers` layers.

    Args:
        num_layers, num_blocks, block_size, num_kv_heads, head_dim: sizes.
        dtype: of keys and values.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        width = 2 * num_kv_heads * head_dim
        # Zeroed: padding of a gathered batch is masked by adding -inf, which a stray NaN would
        # survive.
        self._layers = [
            torch.zeros((num_blocks * block_size, width), dtype=dtype) for _ in range(num_layers)
        ]
        self._kv_shape = (2, num_kv_heads, head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(layer.nbytes for layer in self._layers)

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values.

        Args:
            layer: index within the shard.
            slots: [T] int64, block id · block_size + offset.
            kv: [T, 2 · KV heads · D], keys first.
        """
        self._layers[layer].index_copy_(0, slots, kv)

    def gather(self, layer: int, blocks: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
        """Keys and values of whole block tables.

        Args:
            layer: index within the shard.
            blocks: [num_sequences · blocks each] int64 block ids.
            num_sequences: B; every sequence has as many entries.
        Returns:
            keys and values, each [B, KV heads, S, D] (strided views of one copy).
        """
        flat = self._layers[layer].view(self.num_blocks, -1).index_select(0, blocks)
        return self._split(flat.view(num_sequences, -1, *self._kv_shape))

    def window(self, layer: int, first_slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of consecutive slots without a copy, each [1, KV heads, length, D]."""
        return self._split(
            self._layers[layer].narrow(0, first_slot, length).view(1, length, *self._kv_shape)
        )

    def _split(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

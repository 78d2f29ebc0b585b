"""The paged KV cache of one shard. S context.

A block holds keys and values of `block_size` consecutive tokens of one sequence; block ids are the
same on every stage and are owned by the scheduler. A layer's cache is [2 · KV heads, slot, D], all
key heads first: one head's keys of a block lie together, so that blocks are gathered in large
pieces straight into the contiguous [pairs, S, D] that batched matrix products want. (Given strided
keys and values, torch copies them, or takes a path that is 3 to 30 times slower.)
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(blocks: Tensor, *, num_kv_heads: int, num_blocks: int) -> Tensor:
    """Where the pieces of some sequences' keys and values are, for `KVCache.gather`.

    Args:
        blocks: [B, blocks each] int64, block tables of equal length.
        num_kv_heads, num_blocks: of the cache.
    Returns:
        [2, B · KV heads, blocks each] int64, keys first; a pair is a sequence and a KV head.
    """
    heads = torch.arange(2 * num_kv_heads).view(2, 1, num_kv_heads, 1) * num_blocks
    return (heads + blocks[None, :, None]).view(2, -1, blocks.shape[1])


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
        self._num_kv_heads, self._head_dim = num_kv_heads, head_dim
        # Zeroed: padding of a gathered batch is masked by adding -inf, which a stray NaN would
        # survive.
        shape = (2 * num_kv_heads, num_blocks * block_size, head_dim)
        self._layers = [torch.zeros(shape, dtype=dtype) for _ in range(num_layers)]
        self._keys = [layer[:num_kv_heads].unsqueeze(0) for layer in self._layers]
        self._values = [layer[num_kv_heads:].unsqueeze(0) for layer in self._layers]
        self._pieces = [layer.view(-1, block_size * head_dim) for layer in self._layers]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(layer.nbytes for layer in self._layers)

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values.

        Args:
            layer: index within the shard.
            slots: [T] int64, block id · block_size + offset.
            kv: [T, 2 · KV heads · D], keys first; rows may be strided.
        """
        by_head = kv.view(-1, 2 * self._num_kv_heads, self._head_dim).transpose(0, 1)
        self._layers[layer].index_copy_(1, slots, by_head)

    def gather(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of whole blocks.

        Args:
            layer: index within the shard.
            rows: [2, P, blocks each] int64, made by `gather_rows` (some of its pairs, or all).
        Returns:
            keys and values, each [P, S, D] contiguous, S = blocks each · block_size.
        """
        flat = self._pieces[layer].index_select(0, rows.view(-1))
        keys, values = flat.view(2, rows.shape[1], -1, self._head_dim).unbind(0)
        return keys, values

    def window(self, layer: int, first_slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of consecutive slots without a copy, each [1, KV heads, length, D]."""
        return (
            self._keys[layer].narrow(2, first_slot, length),
            self._values[layer].narrow(2, first_slot, length),
        )

"""The paged KV cache of one shard. S context.

A block holds keys and values of `block_size` consecutive tokens of one sequence; block ids are the
same on every stage and are owned by the scheduler. A layer's cache is [2 · KV heads, slot, D], all
key heads first: one head's keys of a block lie together, so that blocks are gathered in large
pieces straight into the contiguous [pairs, S, D] that batched matrix products want. (Given strided
keys and values, torch copies them, or takes a path that is 3 to 30 times slower.)

In int8 each key and each value is 8-bit integers [D] times one scale of its own, so that a token's
rounding depends on that token only. Attention of many queries gets them widened and scaled. That of
one query gets the integers, as q · (s · k) = s · (q · k): the scales are multiplied with scores and
probabilities, D times fewer than the integers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.kernels import cpu
from tightfit.kernels.formats import KVFormat


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
        dtype: in which keys and values come and are handed back.
        kv_format: how they lie here: in that dtype, or in int8.
        device: torch device name.
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
        kv_format: KVFormat,
        device: str = "cpu",
    ) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self._num_kv_heads, self._head_dim, self._dtype = num_kv_heads, head_dim, dtype
        self._is_int8 = kv_format is KVFormat.INT8
        # Zeroed: padding of a gathered batch is masked by adding -inf, which a stray NaN would
        # survive. And written, so that memory that is not there is missed now.
        shape = (2 * num_kv_heads, num_blocks * block_size, head_dim)
        stored = torch.int8 if self._is_int8 else dtype
        self._layers = [torch.zeros(shape, dtype=stored, device=device) for _ in range(num_layers)]
        self._keys = [layer[:num_kv_heads].unsqueeze(0) for layer in self._layers]
        self._values = [layer[num_kv_heads:].unsqueeze(0) for layer in self._layers]
        self._pieces = [layer.view(-1, block_size * head_dim) for layer in self._layers]
        self._scales = [
            torch.zeros(shape[:2], dtype=torch.bfloat16, device=device)
            for _ in range(num_layers * self._is_int8)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, scales included."""
        return sum(tensor.nbytes for tensor in (*self._layers, *self._scales))

    def clear(self, layer: int) -> None:
        """Zeros in all blocks of a layer."""
        self._layers[layer].zero_()
        if self._is_int8:
            self._scales[layer].zero_()

    def storage(self, layer: int) -> tuple[Tensor, Tensor | None]:
        """A layer's keys and values [2 · KV heads, slots, D], and their scales [2 · KV heads,
        slots] in int8."""
        return self._layers[layer], self._scales[layer] if self._is_int8 else None

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values.

        Args:
            layer: index within the shard.
            slots: [T] int64, block id · block_size + offset.
            kv: [T, 2 · KV heads · D], keys first; rows may be strided.
        """
        by_head = kv.view(-1, 2 * self._num_kv_heads, self._head_dim).transpose(0, 1)
        if self._is_int8:
            by_head, scale = cpu.quantize_kv(by_head)
            self._scales[layer].index_copy_(1, slots, scale)
        self._layers[layer].index_copy_(1, slots, by_head)

    def gather(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of whole blocks.

        Args:
            layer: index within the shard.
            rows: [2, P, blocks each] int64, made by `gather_rows` (some of its pairs, or all).
        Returns:
            keys and values, each [P, S, D] contiguous, S = blocks each · block_size.
        """
        keys, values, scales = self.gather_unscaled(layer, rows)
        if scales is not None:
            keys.mul_(scales[0].transpose(1, 2))
            values.mul_(scales[1].transpose(1, 2))
        return keys, values

    def gather_unscaled(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same before keys and values are multiplied by their scales.

        Returns:
            keys and values as `gather` has them, and their scales [2, P, 1, S]; None where they
            have none.
        """
        index = rows.view(-1)
        flat, scales = self._pieces[layer].index_select(0, index), None
        if self._is_int8:
            flat = flat.to(self._dtype)
            scales = self._scales[layer].view(-1, self.block_size).index_select(0, index)
            scales = scales.view(2, rows.shape[1], 1, -1)
        keys, values = flat.view(2, rows.shape[1], -1, self._head_dim).unbind(0)
        return keys, values, scales

    def window(self, layer: int, first_slot: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of consecutive slots, each [1, KV heads, length, D]; a copy only in
        int8."""
        keys = self._keys[layer].narrow(2, first_slot, length)
        values = self._values[layer].narrow(2, first_slot, length)
        if not self._is_int8:
            return keys, values
        scales = self._scales[layer].narrow(1, first_slot, length)[None, :, :, None]
        key_scales, value_scales = scales.chunk(2, 1)
        return (
            keys.to(self._dtype).mul_(key_scales),
            values.to(self._dtype).mul_(value_scales),
        )

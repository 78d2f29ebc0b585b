"""How the integers of 4 and 3 bits lie in memory.

N output features, K input features, q [N, K] whole numbers in [0, 2^bits).

- 4 bits, `Layout.ROWS`: [N, ⌈K / 2⌉] uint8, two input features of one row in a byte, the first in
  its low half.
- 3 bits, `Layout.ROWS`: [N, ⌈K / 32⌉, 3] int32, 32 input features in 3 words: the low two bits of
  features 0 to 15 in the first, of 16 to 31 in the second (bits 2i and 2i + 1), the top bits of all
  32 in the third (bit i).
- 4 bits, `Layout.BLOCKS`: [N / 64, K, 32] uint8 for N a multiple of 64: for each 64 rows and
  each input feature, byte j holds row j in its low half and row 32 + j in its high one. It is what
  torch's op reads on a CPU with AVX-512.
- `Layout.TILES`, for GPUs: what 64 rows and 128 (4 bits) or 256 (3 bits) input features take lies
  in one piece; N and K are padded to whole tiles. A column c of 32 holds the features c, 32 + c,
  64 + c and 96 + c of 128.
  4 bits: [⌈N / 64⌉, ⌈K / 128⌉, 64, 32] int16, feature 32 i + c in bits 4i to 4i + 3.
  3 bits: [⌈N / 64⌉, ⌈K / 256⌉, 3, 64, 32] uint8: the low two bits of the first 128 features (bits
  2i and 2i + 1), those of the second 128, and the top bits of both (bit i, bit 4 + i).
"""

from __future__ import annotations

from enum import Enum
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.formats import TILE_FEATURES, TILE_PIECE, TILE_ROWS, VALUES_PER_PACK

BLOCK_ROWS: Final = 64
HALF_BLOCK: Final = BLOCK_ROWS // 2


class Layout(Enum):
    """Where a weight's integers lie; see the module's text."""

    ROWS = "rows"
    BLOCKS = "blocks"
    TILES = "tiles"


def pack(integers: Tensor, *, bits: int, layout: Layout) -> Tensor:
    """q [N, K] of any integer dtype in a layout; `BLOCKS` wants 4 bits and N a multiple of 64."""
    match layout:
        case Layout.BLOCKS:
            return pack_blocks(integers)
        case Layout.TILES:
            return pack_tiles(integers, bits=bits)
        case Layout.ROWS:
            return pack_rows(integers, bits=bits)


def pack_rows(integers: Tensor, *, bits: int) -> Tensor:
    """q [N, K] of any integer dtype, in [0, 2^bits), to `Layout.ROWS`; missing features are 0."""
    values = VALUES_PER_PACK[bits]
    padded = F.pad(integers, (0, -integers.shape[1] % values))
    if bits == 4:
        padded = padded.to(torch.uint8)
        return padded[:, ::2] | padded[:, 1::2] << 4
    rows = padded.to(torch.int32).view(integers.shape[0], -1, 32)
    low = ((rows & 3).view(*rows.shape[:-1], 2, 16) << (2 * _shifts(16, rows))).sum(-1)
    high = ((rows >> 2) << _shifts(32, rows)).sum(-1, keepdim=True)
    return torch.cat((low, high), -1).to(torch.int32)  # sums are int64: bit 31 becomes the sign


def unpack_rows(packed: Tensor, *, bits: int, n_in: int) -> Tensor:
    """The reverse of `pack_rows`: [N, n_in]."""
    if bits == 4:
        pairs = torch.stack((packed & 15, packed >> 4), -1)
        return pairs.flatten(1)[:, :n_in]
    low = (packed[..., :2, None] >> (2 * _shifts(16, packed)) & 3).flatten(-2)
    high = packed[..., 2:] >> _shifts(32, packed) & 1
    return low.add_(high, alpha=4).flatten(1)[:, :n_in]


def _shifts(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=like.device)


def pack_blocks(integers: Tensor) -> Tensor:
    """q [N, K] in [0, 16), N a multiple of 64, to `Layout.BLOCKS`."""
    blocks = integers.to(torch.uint8).view(-1, 2, HALF_BLOCK, integers.shape[1])
    return (blocks[:, 0] | blocks[:, 1] << 4).transpose(1, 2).contiguous()


def unpack_blocks(packed: Tensor) -> Tensor:
    """The reverse of `pack_blocks`: [N, K]."""
    halves = torch.cat((packed & 15, packed >> 4), -1)
    return halves.transpose(1, 2).reshape(-1, packed.shape[1])


def pack_tiles(integers: Tensor, *, bits: int) -> Tensor:
    """q [N, K] of any integer dtype, in [0, 2^bits), to `Layout.TILES`."""
    n_out, n_in = integers.shape
    features = TILE_FEATURES[bits]
    padded = F.pad(integers.to(torch.uint8), (0, -n_in % features, 0, -n_out % TILE_ROWS))
    fields = padded.view(padded.shape[0] // TILE_ROWS, TILE_ROWS, -1, features)
    fields = fields.transpose(1, 2)  # [row tiles, tiles, rows, features]
    if bits == 4:
        halves = fields.reshape(*fields.shape[:-1], 2, 2, TILE_PIECE)
        pairs = halves[..., 0, :] | halves[..., 1, :] << 4  # bytes of features i and i + 1
        return pairs.transpose(-1, -2).contiguous().view(torch.int16).squeeze(-1)
    fields = fields.reshape(*fields.shape[:-1], 2, 4, TILE_PIECE)
    shifts = torch.arange(4, dtype=torch.uint8, device=integers.device)[:, None]
    low = ((fields & 3) << (2 * shifts)).sum(-2, dtype=torch.uint8)
    top = ((fields >> 2) << shifts).sum(-2, dtype=torch.uint8)
    planes = (low[..., 0, :], low[..., 1, :], top[..., 0, :] | top[..., 1, :] << 4)
    return torch.stack(planes, 2)


def unpack_tiles(packed: Tensor, *, bits: int, n_out: int, n_in: int) -> Tensor:
    """The reverse of `pack_tiles`: [n_out, n_in] uint8."""
    shifts = torch.arange(4, dtype=torch.uint8, device=packed.device)[:, None]
    if bits == 4:
        halves = packed.unsqueeze(-1).view(torch.uint8).transpose(-1, -2)
        fields = torch.stack((halves & 15, halves >> 4), -2).flatten(-3)
    else:
        low, top = packed[:, :, :2].transpose(2, 3), packed[:, :, 2]
        tops = torch.stack((top & 15, top >> 4), -2)
        bits_of = (low.unsqueeze(-2) >> (2 * shifts) & 3) | (tops.unsqueeze(-2) >> shifts & 1) << 2
        fields = bits_of.flatten(-3)
    return fields.transpose(1, 2).reshape(packed.shape[0] * TILE_ROWS, -1)[:n_out, :n_in]

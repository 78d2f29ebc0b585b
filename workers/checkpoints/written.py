"""Linear layers as compressed-tensors stores them: the reverse of `packed.py`.

N output features, K input features, G groups. Layouts `pack-quantized` of compressed-tensors 0.20,
and for 3 bits or real zero points our own dense ones (`stored.Packing.DENSE_3`, `DENSE_4`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from tightfit.kernels.groups import Quantized
from tightfit.kernels.packing import pack_rows
from tightfit.workers.stored import WORD_BITS, Packing, StoredScheme

HASH_BLOCK_BYTES = 2**22


def stored_tensors(weight: Quantized, scheme: StoredScheme) -> dict[str, Tensor]:
    """What a checkpoint has of one layer, by the last part of the names.

    Args:
        weight: [N, K].
        scheme: with the packing WORDS, DENSE_3 or DENSE_4.
    """
    tensors = {
        "weight_scale": weight.scale.to(torch.bfloat16).contiguous(),
        "weight_shape": torch.tensor(weight.integers.shape),
    }
    if scheme.packing is Packing.DENSE_3:
        tensors["weight_packed"] = pack_rows(weight.integers, bits=3).flatten(1)
    else:
        tensors["weight_packed"] = _words(weight.integers, scheme.bits)
    if scheme.is_dense:
        dtype = torch.bfloat16 if scheme.has_real_zero else torch.uint8
        tensors["weight_zero_point"] = weight.zero_point.to(dtype).contiguous()
    elif not scheme.is_symmetric:
        zero_point = _words(weight.zero_point.to(torch.uint8).t(), scheme.bits)
        tensors["weight_zero_point"] = zero_point.t().contiguous()
    return tensors


def _words(values: Tensor, bits: int) -> Tensor:
    """uint8 [R, C] → int32 words [R, ⌈C · bits / 32⌉], lowest bits first."""
    padded = F.pad(values, (0, -values.shape[1] % (WORD_BITS // bits)))
    pieces = padded if bits == 8 else pack_rows(padded, bits=bits)
    return pieces.flatten().view(torch.int32).view(values.shape[0], -1)


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file, whole or not at all, and return its SHA-256."""
    fresh = path.with_name(f"{path.name}.part")
    fresh.touch()
    mode = fresh.stat().st_mode  # the safetensors package gives the owner alone a right to read
    safetensors.torch.save_file(dict(tensors), fresh, metadata={"format": "pt"})
    fresh.chmod(mode)
    with fresh.open("rb+") as file:
        os.fsync(file.fileno())
    digest = file_hash(fresh)
    os.replace(fresh, path)
    return digest


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()

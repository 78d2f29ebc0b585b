"""One .safetensors file: 8 bytes of length, a JSON header, the tensors' bytes.

Read here and not by the safetensors package because that maps files writable (see `MappedFile`).
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.workers.checkpoints.base import DTYPE_NAMES, INTEGER_NAMES, MappedFile, Place
from tightfit.workers.errors import CheckpointError

DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
ALL_NAMES: Final = {**DTYPE_NAMES, **INTEGER_NAMES}
ITEM_BYTES: Final = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2,
    "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
}  # fmt: skip
"""Dtypes of the format whose items are whole bytes."""

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""

DAMAGED: Final = "the file is damaged or not safetensors; copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """From the start of the file."""
    nbytes: int


class SafetensorsFile:
    """One file; its header is checked in full when it is opened, no tensor is touched.

    Raises:
        CheckpointError: missing, truncated or malformed; names the file, and the tensor if one is
            concerned.
    """

    label = "safetensors"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        size = int.from_bytes(self._file.bytes_at(0, 8), "little")
        if len(self._file) < 8 or size > min(MAX_HEADER_BYTES, len(self._file) - 8):
            raise CheckpointError(
                path,
                None,
                f"its header of {size:,} bytes does not fit the file of {len(self._file):,}; "
                "the file is truncated or not safetensors, copy it again",
            )
        try:
            header = json.loads(self._file.bytes_at(8, size))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(path, None, f"malformed header ({error}); {DAMAGED}") from error
        if not isinstance(header, dict):
            raise CheckpointError(path, None, f"its header is no JSON object; {DAMAGED}")
        header.pop("__metadata__", None)
        self._entries = {name: self._entry(name, value, 8 + size) for name, value in header.items()}

    def _entry(self, name: str, value: Any, data_start: int) -> _Entry:
        """One tensor's place, checked against its shape and the file's length."""
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise CheckpointError(self.path, name, f"malformed entry in the header; {DAMAGED}")
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
            raise CheckpointError(self.path, name, f"malformed shape {shape}; {DAMAGED}")
        size, items = end - begin, math.prod(shape)
        # Unknown dtypes (some pack several items into a byte) are refused only when wanted.
        if begin < 0 or size < 0 or (dtype in ITEM_BYTES and size != items * ITEM_BYTES[dtype]):
            raise CheckpointError(
                self.path, name, f"{dtype} {shape} at bytes {begin} to {end} cannot be; {DAMAGED}"
            )
        if data_start + end > len(self._file):
            raise CheckpointError(
                self.path,
                name,
                f"ends at byte {data_start + end:,}, but the file has {len(self._file):,}; "
                "it is truncated, copy it again",
            )
        return _Entry(dtype=dtype, shape=tuple(shape), offset=data_start + begin, nbytes=size)

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._entries[name].shape

    def dtype(self, name: str) -> str:
        """See `Checkpoint`."""
        stored = self._entries[name].dtype
        return ALL_NAMES[DTYPES[stored]] if stored in DTYPES else stored

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._entries[name].nbytes

    def place(self, name: str) -> Place:
        """See `Checkpoint`."""
        entry = self._entries[name]
        return Place(path=self.path, offset=entry.offset, kind=entry.dtype, shape=entry.shape)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; the dtype is one that `check_dtype` lets pass."""
        entry = self._entries[name]
        return self._file.tensor(entry.offset, DTYPES[entry.dtype], entry.shape)

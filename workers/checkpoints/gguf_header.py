"""The header of a GGUF file: metadata and where every tensor lies.

Read here and not by the gguf package: that one takes seconds for a vocabulary that is not needed,
and follows the lengths in a damaged file without looking at the file's own.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Final

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from tightfit.workers.checkpoints.base import MappedFile
from tightfit.workers.errors import CheckpointError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMS: Final = 4
MAX_KEPT_ITEMS: Final = 4096
"""Longer arrays of metadata (vocabularies) are skipped; their length is kept."""

UINT32: Final = struct.Struct("<I")
UINT64: Final = struct.Struct("<Q")
SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: UINT32,
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: UINT64,
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
"""Value types by their number in the file."""
STRING_TYPE: Final = 8
ARRAY_TYPE: Final = 9

REMEDY: Final = "the file is truncated or damaged, copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class LongArray:
    """An array of metadata whose items were not kept."""

    length: int


Value = int | float | bool | str | list[int | float | bool] | LongArray


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """One tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    """In torch's order, outermost first."""
    kind: GGMLQuantizationType
    offset: int
    """First byte, from the start of the file."""
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a GGUF file says before its tensors' bytes."""

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(file: MappedFile) -> Header:
    """Parse and check a header; no tensor is touched.

    Raises:
        CheckpointError: not GGUF, an unknown version or type, or a tensor beyond the file's end.
    """
    reader = _Cursor(file)
    try:
        return _read(reader)
    except (struct.error, UnicodeDecodeError, OverflowError) as error:
        problem = f"malformed header near byte {reader.position:,} ({error}); {REMEDY}"
        raise CheckpointError(file.path, None, problem) from error


def _read(reader: _Cursor) -> Header:
    path, size = reader.file.path, len(reader.file)
    if (magic := reader.file.bytes_at(0, 4)) != MAGIC:
        raise CheckpointError(path, None, f"begins with {magic!r}, not {MAGIC!r}: no GGUF file")
    reader.position = 4
    version = reader.scalar(UINT32)
    if version not in VERSIONS:
        known = " and ".join(map(str, VERSIONS))
        problem = f"is GGUF version {version} (or big-endian); supported are {known}, little-endian"
        raise CheckpointError(path, None, problem)
    num_tensors, num_values = reader.scalar(UINT64), reader.scalar(UINT64)
    metadata: dict[str, Value] = {}
    for _ in range(num_values):
        key = reader.string()
        metadata[key] = reader.value(reader.scalar(UINT32))
    raw = [_tensor_entry(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
        raise CheckpointError(path, None, f"general.alignment is {alignment}; {REMEDY}")
    data_start = math.ceil(reader.position / alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, kind_number, offset in raw:
        info = _place(reader.file, name, shape, kind_number, data_start + offset)
        if info.offset + info.nbytes > size:
            problem = f"ends at byte {info.offset + info.nbytes:,}, the file at {size:,}; {REMEDY}"
            raise CheckpointError(path, name, problem)
        tensors[name] = info
    return Header(metadata=metadata, tensors=tensors)


def _tensor_entry(reader: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """(name, shape, type number, offset from the start of the data)."""
    name = reader.string()
    num_dims = reader.scalar(UINT32)
    if num_dims > MAX_DIMS:
        raise CheckpointError(reader.file.path, name, f"has {num_dims} dimensions; {REMEDY}")
    shape = tuple(reversed([reader.scalar(UINT64) for _ in range(num_dims)]))
    if 0 in shape:
        raise CheckpointError(reader.file.path, name, f"has shape {list(shape)}: no data; {REMEDY}")
    return name, shape, reader.scalar(UINT32), reader.scalar(UINT64)


def _place(
    file: MappedFile, name: str, shape: tuple[int, ...], kind_number: int, offset: int
) -> TensorInfo:
    try:
        kind = GGMLQuantizationType(kind_number)
    except ValueError:
        problem = f"has the unknown tensor type {kind_number}; convert the model to Q8_0 or F16"
        raise CheckpointError(file.path, name, problem) from None
    block_items, block_bytes = GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % block_items:
        problem = f"has shape {list(shape)}, but {kind.name} has blocks of {block_items}; {REMEDY}"
        raise CheckpointError(file.path, name, problem)
    nbytes = math.prod(shape) // block_items * block_bytes
    return TensorInfo(name=name, shape=shape, kind=kind, offset=offset, nbytes=nbytes)


class _Cursor:
    """Reads a mapped file forwards; never past its end, never more than is there."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self._buffer = file.buffer

    def scalar(self, kind: struct.Struct) -> int:
        """One number; `struct.error` past the end."""
        (value,) = kind.unpack_from(self._buffer, self.position)
        self.position += kind.size
        return value  # type: ignore[no-any-return]

    def string(self) -> str:
        """A length and UTF-8."""
        return self._take(self.scalar(UINT64)).decode()

    def value(self, kind: int) -> Value:
        """One value of the metadata."""
        if kind == STRING_TYPE:
            # Tokenizers' texts may be anything; names are checked where they are used.
            return self._take(self.scalar(UINT64)).decode(errors="replace")
        if kind == ARRAY_TYPE:
            return self._array()
        return self.scalar(self._scalar_kind(kind))

    def _array(self) -> Value:
        kind, length = self.scalar(UINT32), self.scalar(UINT64)
        if kind == STRING_TYPE:
            self._check_room(length * UINT64.size)
            for _ in range(length):
                self._skip(self.scalar(UINT64))
            return LongArray(length=length)
        item = self._scalar_kind(kind)
        self._check_room(length * item.size)
        if length > MAX_KEPT_ITEMS:
            self._skip(length * item.size)
            return LongArray(length=length)
        return [self.scalar(item) for _ in range(length)]

    def _scalar_kind(self, kind: int) -> struct.Struct:
        if kind not in SCALARS:
            raise struct.error(f"unknown value type {kind}")
        return SCALARS[kind]

    def _take(self, size: int) -> bytes:
        start = self.position
        self._skip(size)
        return self.file.bytes_at(start, size)

    def _skip(self, size: int) -> None:
        self._check_room(size)
        self.position += size

    def _check_room(self, size: int) -> None:
        if size > len(self.file) - self.position:
            raise struct.error(f"{size:,} bytes are announced, the file ends at {len(self.file):,}")

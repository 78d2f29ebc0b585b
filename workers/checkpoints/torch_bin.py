"""One .bin file, as `torch.save` writes it: a zip of a pickle and of raw, uncompressed storages.

The pickle is read with an allow-list that makes descriptions, not tensors: no code of the file
runs, and no storage is read before its tensor is wanted. Its operations are looked through before,
as a few bytes of a pickle can ask the interpreter for any amount of memory.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.workers.checkpoints.base import DTYPE_NAMES, MappedFile, Place
from tightfit.workers.errors import CheckpointError

STORAGE_DTYPES: Final = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}  # fmt: skip
LOCAL_HEADER: Final = struct.Struct("<4s22xHH")
"""Of a zip member: signature, 22 bytes also in the directory, lengths of name and extra field."""
LOCAL_SIGNATURE: Final = b"PK\x03\x04"

MAX_PICKLE_BYTES: Final = 64 * 2**20
"""A hundred thousand tensors' descriptions take a tenth of it."""

REMEDY: Final = "the file is truncated or damaged: copy it again"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Storage:
    dtype: torch.dtype
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Described:
    """A tensor in the pickle: where it lies in which storage."""

    storage: _Storage
    first: int
    """Item of the storage at which it begins."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def end(self) -> int:
        """One past its last item in the storage."""
        if 0 in self.shape:
            return self.first
        steps = zip(self.shape, self.stride, strict=True)
        return self.first + sum((n - 1) * step for n, step in steps) + 1


def _describe(storage: object, first: object, shape: object, stride: object, *_: object) -> object:
    """Stands for `torch._utils._rebuild_tensor_v2`."""
    if not (
        isinstance(storage, _Storage)
        and isinstance(first, int)
        and isinstance(shape, tuple)
        and isinstance(stride, tuple)
        and len(shape) == len(stride)
        and all(isinstance(n, int) and n >= 0 for n in (first, *shape, *stride))
    ):
        raise pickle.UnpicklingError("a tensor's description is malformed")
    return _Described(storage=storage, first=first, shape=shape, stride=stride)


def _parameter(data: object, *_: object) -> object:
    """Stands for `torch._utils._rebuild_parameter`."""
    return data


ALLOWED: Final[Mapping[tuple[str, str], Callable[..., object]]] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _describe,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no weights need")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int()):
                return _Storage(dtype=dtype, key=key)
        raise pickle.UnpicklingError("a storage's description is malformed")


def _read_pickle(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> object:
    """What the file's pickle describes.

    Raises:
        Exception: nearly any, if it is damaged; pickle.UnpicklingError, if it asks for more than
            weights need.
    """
    if member.file_size > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(
            f"its data.pkl has {member.file_size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read"
        )
    content = archive.read(member)  # checks the CRC
    for operation, argument, _ in pickletools.genops(content):
        # The interpreter makes room for as many memo entries as the index says.
        if operation.name.endswith("PUT") and int(argument or 0) > len(content):
            raise pickle.UnpicklingError(f"it notes something at index {argument}")
    return _Unpickler(io.BytesIO(content)).load()


class TorchFile:
    """One file; directory, pickle and every storage's place are checked when it is opened.

    Raises:
        CheckpointError: missing, truncated, malformed, of torch's format before 1.6, or asking for
            anything but tensors.
    """

    label = "torch .bin"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = MappedFile(path)
        try:
            with zipfile.ZipFile(path) as archive:
                members = {member.filename: member for member in archive.infolist()}
                pickles = [name for name in members if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise ValueError("there is no data.pkl in it")
                root = pickles[0].removesuffix("data.pkl")
                if members.get(f"{root}byteorder") and archive.read(f"{root}byteorder") == b"big":
                    raise ValueError("it is big-endian")
                state = _read_pickle(archive, members[pickles[0]])
        except Exception as error:
            # Damaged pickles raise nearly anything; all of it means the same.
            problem = str(error) or type(error).__name__
            if self._file.bytes_at(0, 4) != LOCAL_SIGNATURE:
                problem = "it is no zip archive, as torch.save writes since 1.6"
            raise CheckpointError(
                path, None, f"cannot be read ({problem}); {REMEDY}, or save it as safetensors"
            ) from error
        if not isinstance(state, dict):
            raise CheckpointError(path, None, "does not hold a dictionary of tensors")
        self._members, self._root = members, root
        self._tensors: dict[str, _Described] = {
            name: tensor
            for name, tensor in state.items()
            if isinstance(name, str) and isinstance(tensor, _Described)
        }
        self._offsets = {name: self._place(name, t) for name, t in self._tensors.items()}

    def _place(self, name: str, tensor: _Described) -> int:
        """Byte of the file at which the tensor's storage begins; the whole tensor is inside it."""
        member = self._members.get(f"{self._root}data/{tensor.storage.key}")
        if member is None:
            raise CheckpointError(self.path, name, f"its data is not in the file; {REMEDY}")
        header = self._file.bytes_at(member.header_offset, LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or not header.startswith(LOCAL_SIGNATURE):
            raise CheckpointError(self.path, name, f"its zip header is malformed; {REMEDY}")
        _, name_bytes, extra_bytes = LOCAL_HEADER.unpack(header)
        start = member.header_offset + LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise CheckpointError(
                self.path,
                name,
                "its data is compressed; save it with torch.save, or as safetensors",
            )
        needed = tensor.end * tensor.storage.dtype.itemsize
        if needed > member.file_size or start + member.file_size > len(self._file):
            raise CheckpointError(
                self.path,
                name,
                f"needs {needed:,} bytes of a storage of {member.file_size:,} at byte {start:,} "
                f"of a file of {len(self._file):,}; {REMEDY}",
            )
        return start

    def names(self) -> frozenset[str]:
        """Every tensor's name."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """See `Checkpoint`."""
        dtype = self._tensors[name].storage.dtype
        return DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        tensor = self._tensors[name]
        return math.prod(tensor.shape) * tensor.storage.dtype.itemsize

    def place(self, name: str) -> Place:
        """See `Checkpoint`: tensors that shared a storage when they were saved lie in one place."""
        tensor, dtype = self._tensors[name], self._tensors[name].storage.dtype
        return Place(
            path=self.path,
            offset=self._offsets[name] + tensor.first * dtype.itemsize,
            kind=str(dtype),
            shape=tensor.shape,
            stride=tensor.stride,
        )

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; strided as it was saved."""
        tensor, dtype = self._tensors[name], self._tensors[name].storage.dtype
        if 0 in tensor.shape:
            return torch.empty(tensor.shape, dtype=dtype)
        count = tensor.end - tensor.first
        flat = self._file.tensor(self.place(name).offset, dtype, (count,))
        return flat.as_strided(tensor.shape, tensor.stride)

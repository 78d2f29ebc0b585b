"""What every reader offers, and what they share: JSON, mapped files, checks."""

from __future__ import annotations

import json
import math
import mmap
import warnings
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from tightfit.workers.errors import CheckpointError

DTYPE_NAMES: Final = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
"""Stored dtypes of weights that were not quantised, and how they are called here."""

INTEGER_NAMES: Final = {
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int32: "int32",
    torch.int64: "int64",
}
"""Stored dtypes of whole numbers in checkpoints that are already quantised."""

COPY_BELOW_BYTES: Final = 2**20
"""Smaller tensors are copied out: a norm kept for good shall not keep a shard file mapped."""


class Place(NamedTuple):
    """Where a tensor's bytes lie and how they are read: tensors with equal places are equal."""

    path: Path
    """The file."""
    offset: int
    """Its first byte there."""
    kind: str
    """Dtype as stored, and anything else that `read` goes by."""
    shape: tuple[int, ...]
    stride: tuple[int, ...] | None = None
    """In items; None: contiguous."""


class Checkpoint(Protocol):
    """Tensors by their Hugging Face names, read one at a time.

    Every method may raise CheckpointError, naming file and tensor; nothing else is raised on
    account of a damaged file.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json's content; for GGUF made from the metadata, in the same words."""

    @property
    def source_format(self) -> str:
        """What the files hold, for the log: "safetensors bf16, 3 files"."""

    def names(self) -> frozenset[str]:
        """Every tensor's name; no weight file is opened if an index tells them."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading the tensor."""

    def dtype(self, name: str) -> str:
        """As stored: "fp32", "bf16", "fp16", or the file format's own word for another."""

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor in its file."""

    def place(self, name: str) -> Place:
        """Where it is stored; several names may share one."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU in its stored dtype; GGUF's quants widened to fp32.

        It may be a read-only view of the file (pages of the page cache, no anonymous memory):
        writing into it ends the process. It stays valid after `close`.
        """

    def validate(
        self, wanted: Iterable[tuple[str, tuple[int, ...]]], integers: Container[str] = ()
    ) -> None:
        """Check that these tensors are there, whole, with these shapes and a usable dtype: of whole
        numbers for those in `integers`, else floating.

        Opens the files that hold them and reads headers only.
        """

    def close(self) -> None:
        """Release the files. Tensors that were read live on."""


MAX_JSON_BYTES = 64 * 2**20
"""Of a config, or an index of tensors."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it is missing, or is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ValueError(f"it has more than {MAX_JSON_BYTES:,} bytes")
        content = json.loads(data)
    except FileNotFoundError:
        raise CheckpointError(path, None, "the file is missing; copy it from the model") from None
    except (OSError, ValueError, RecursionError) as error:
        problem = f"cannot be read as JSON ({error}); copy it again from the model"
        raise CheckpointError(path, None, problem) from error
    if not isinstance(content, dict):
        problem = f"holds a JSON {type(content).__name__}, not an object; copy it again"
        raise CheckpointError(path, None, problem)
    return content


def check_shape(
    path: Path, name: str, *, expected: tuple[int, ...], found: tuple[int, ...]
) -> None:
    """Raise CheckpointError unless a tensor's shape is the one that the config makes it."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            path,
            name,
            f"expected shape {list(expected)} by the config, found {list(found)}; "
            "config and weights are of different models",
        )


def check_dtype(path: Path, name: str, dtype: str, *, is_integer: bool = False) -> None:
    """Raise CheckpointError unless tensors stored so can be served."""
    if is_integer:
        if dtype not in INTEGER_NAMES.values():
            problem = f"is stored as {dtype}; by config.json it should hold quantised whole numbers"
            raise CheckpointError(path, name, problem)
        return
    if dtype not in DTYPE_NAMES.values():
        raise CheckpointError(
            path,
            name,
            f"is stored as {dtype}; weights are read from {', '.join(DTYPE_NAMES.values())}. "
            "config.json says nothing of a quantisation; use the checkpoint that was not quantised",
        )


class MappedFile:
    """A file mapped read-only: what is read of it is page cache, and is never counted as data.

    A private writable mapping, as torch and safetensors make, counts against RLIMIT_DATA in full,
    which is how a stage's memory budget is enforced.

    Raises:
        CheckpointError: the file cannot be opened, or is empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise CheckpointError(path, None, "the file is missing; copy it here") from None
        except ValueError as error:
            raise CheckpointError(path, None, "the file is empty; copy it again") from error
        except OSError as error:
            raise CheckpointError(path, None, f"cannot be opened: {error}") from error
        self._last: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._map)

    def bytes_at(self, offset: int, size: int) -> bytes:
        """Some bytes, copied; fewer at the end of the file."""
        return self._map[offset : offset + size]

    @property
    def buffer(self) -> mmap.mmap:
        """The whole file."""
        return self._map

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor that starts at byte `offset`: a view, or a copy if it is small.

        The pages of the tensor read before are unmapped first (they stay in the page cache), so
        that resident memory does not grow with every tensor.
        """
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        self._release_last()
        self._last = (offset, count * dtype.itemsize)
        with warnings.catch_warnings():
            # torch warns that the memory is not writable: that is the point of it.
            warnings.simplefilter("ignore", UserWarning)
            flat = torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        tensor = flat.view(shape)
        return tensor.clone() if tensor.nbytes < COPY_BELOW_BYTES else tensor

    def _release_last(self) -> None:
        if self._last is None:
            return
        start = self._last[0] // mmap.PAGESIZE * mmap.PAGESIZE
        self._map.madvise(mmap.MADV_DONTNEED, start, sum(self._last) - start)
        self._last = None

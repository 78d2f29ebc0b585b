"""Checkpoints: tensors by name, read one at a time, through memory maps.

A reader never holds a file's contents: what `read` returns is backed by the page cache until the caller
copies or quantises it. Names are Hugging Face's, whatever the files are.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tightfit.workers.errors import CheckpointError

CONFIG = "config.json"


class Checkpoint(Protocol):
    """What a stage reads from."""

    config: Mapping[str, Any]
    """config.json's content."""
    source_format: str
    """What the files hold, for the log."""

    def names(self) -> frozenset[str]:
        """Every tensor's name."""

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor in its file."""

    def read(self, name: str) -> Tensor:
        """The tensor on the CPU, as stored, or widened to fp32 when stored quantised."""

    def validate(self, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Check that these tensors are there with these shapes, reading none of them.

        Raises:
            CheckpointError: the first that is not, by file and name.
        """

    def close(self) -> None:
        """Release the files."""


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint directory (safetensors or .bin, single or sharded) or a GGUF file.

    Raises:
        CheckpointError: nothing usable is there; names the file and what to do.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(path, None, "not a .gguf file; give the checkpoint's directory")
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(path, None, "no such file or directory")
    for index, single, opener in (
        ("model.safetensors.index.json", "model.safetensors", SafetensorsFile),
        ("pytorch_model.bin.index.json", "pytorch_model.bin", TorchFile),
    ):
        if (path / index).exists():
            return DirectoryCheckpoint(path, _read_index(path / index), opener)
        if (path / single).exists():
            return DirectoryCheckpoint(path, None, opener, single)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    raise CheckpointError(
        path, None, "holds no model.safetensors, pytorch_model.bin, their index, or one .gguf file"
    )


def _open_gguf(path: Path) -> Checkpoint:
    from tightfit.workers.gguf_checkpoint import GGUFCheckpoint

    return GGUFCheckpoint(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: it is missing or is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, None, "is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, None, f"cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(path, None, "is not a JSON object")
    return content


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in weight_map.values()
    ):
        raise CheckpointError(path, None, "has no weight_map of tensor names to file names")
    for name, file in weight_map.items():
        if not (path.parent / file).exists():
            raise CheckpointError(
                path.parent / file, name, "the index names this file, but it is missing"
            )
    return weight_map


class TensorFile(Protocol):
    """One file of tensors."""

    def names(self) -> Iterable[str]:
        """Every tensor in it."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Without reading it."""

    def nbytes(self, name: str) -> int:
        """Without reading it."""

    def read(self, name: str) -> Tensor:
        """Backed by the file."""

    def close(self) -> None:
        """Release it."""


class SafetensorsFile:
    """One .safetensors file. Its header is checked against its length when it is opened."""

    label = "safetensors"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(str(path), framework="pt", device="cpu")
            self._names = tuple(self._file.keys())
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                path, None, f"cannot be opened ({error}); it is truncated or damaged, copy it again"
            ) from error

    def names(self) -> tuple[str, ...]:
        """See `TensorFile`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorFile`."""
        return tuple(self._file.get_slice(name).get_shape())

    def nbytes(self, name: str) -> int:
        """See `TensorFile`."""
        part = self._file.get_slice(name)
        elements = 1
        for size in part.get_shape():
            elements *= size
        bits = int("".join(c for c in part.get_dtype().partition("_")[0] if c.isdigit()) or 8)
        return elements * bits // 8

    def read(self, name: str) -> Tensor:
        """See `TensorFile`."""
        try:
            tensor: Tensor = self._file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(self._path, name, f"cannot be read: {error}") from error
        return tensor

    def close(self) -> None:
        """See `TensorFile`."""
        del self._file


class TorchFile:
    """One .bin file, unpickled with `weights_only` (no code runs) and memory-mapped."""

    label = "torch .bin"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, OSError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                path, None, f"cannot be opened ({str(error).splitlines()[0]}); it is truncated, damaged, "
                "or in torch's format before 1.6: copy it again or save it as safetensors"
            ) from error  # fmt: skip
        if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
            raise CheckpointError(path, None, "does not hold a dictionary of tensors")
        self._state: dict[str, Tensor] = state

    def names(self) -> tuple[str, ...]:
        """See `TensorFile`."""
        return tuple(self._state)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorFile`."""
        return tuple(self._state[name].shape)

    def nbytes(self, name: str) -> int:
        """See `TensorFile`."""
        return self._state[name].nbytes

    def read(self, name: str) -> Tensor:
        """See `TensorFile`."""
        return self._state[name]

    def close(self) -> None:
        """See `TensorFile`."""
        self._state = {}


class DirectoryCheckpoint:
    """A directory with config.json and one or several files of tensors; files are opened when needed."""

    def __init__(
        self,
        path: Path,
        weight_map: dict[str, str] | None,
        opener: type[SafetensorsFile] | type[TorchFile],
        single: str = "",
    ) -> None:
        self._path, self._opener = path, opener
        self.config: Mapping[str, Any] = read_json(path / CONFIG)
        self._files: dict[str, TensorFile] = {}
        if weight_map is None:
            weight_map = dict.fromkeys(self._open(single).names(), single)
        self._map = weight_map
        self.source_format = f"{opener.label}, {len(set(weight_map.values()))} file(s)"

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            self._files[file] = self._opener(self._path / file)
        return self._files[file]

    def _file(self, name: str) -> TensorFile:
        return self._open(self._map[name])

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._map)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._file(name).nbytes(name)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        return self._file(name).read(name)

    def validate(self, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """See `Checkpoint`."""
        for name, shape in wanted:
            if name not in self._map:
                raise CheckpointError(
                    self._path, name, "is missing, but config.json says that the model has it"
                )
            path, file = self._path / self._map[name], self._file(name)
            if name not in file.names():
                raise CheckpointError(path, name, "the index says it is in this file, but it is not")
            check_shape(path, name, file.shape(name), shape)

    def close(self) -> None:
        """See `Checkpoint`."""
        for file in self._files.values():
            file.close()
        self._files = {}


def check_shape(
    path: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    """Raise CheckpointError unless both are the same."""
    if found != expected:
        raise CheckpointError(
            path, name, f"has shape {list(found)}, but config.json makes it {list(expected)}"
        )

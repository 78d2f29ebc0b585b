"""A Hugging Face directory: config.json and one or several files of tensors."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from torch import Tensor

from tightfit.workers.checkpoints.base import (
    INTEGER_NAMES,
    Place,
    check_dtype,
    check_shape,
    read_json_object,
)
from tightfit.workers.errors import CheckpointError

CONFIG_FILE: Final = "config.json"


class TensorFile(Protocol):
    """One file of tensors; its methods are those of `Checkpoint` for the names that it holds."""

    label: str
    """Of the file format, for the log."""

    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def nbytes(self, name: str) -> int: ...
    def place(self, name: str) -> Place: ...
    def read(self, name: str) -> Tensor: ...


def read_index(path: Path) -> dict[str, Path]:
    """Tensor name → file, by an index file.

    Raises:
        CheckpointError: the index is malformed, or names files outside its directory.
    """
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(path, None, 'has no "weight_map" of tensors to files; copy it again')
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(path, name, f"is placed in {file!r}, which is no plain file name")
    return {name: path.parent / file for name, file in weight_map.items()}


class DirectoryCheckpoint:
    """See `Checkpoint`. Files are opened, and checked, when one of their tensors is asked for.

    So a node needs only the files that its stage reads, and damage elsewhere is another stage's.

    Args:
        directory: where config.json is.
        weights: tensor name → file, or the single file.
        open_file: opens one file; raises CheckpointError if it is damaged.
    """

    def __init__(
        self,
        directory: Path,
        weights: Mapping[str, Path] | Path,
        open_file: Callable[[Path], TensorFile],
    ) -> None:
        self._directory, self._open = directory, open_file
        self.config: Mapping[str, Any] = read_json_object(directory / CONFIG_FILE)
        self._files: dict[Path, TensorFile] = {}
        if isinstance(weights, Path):
            self._where: Mapping[str, Path] = dict.fromkeys(self._file(weights).names(), weights)
        else:
            self._where = weights
        self._names = frozenset(self._where)

    def _file(self, path: Path, tensor: str | None = None) -> TensorFile:
        if path not in self._files:
            if tensor is not None and not path.is_file():
                raise CheckpointError(
                    path, tensor, "the index names this file, but it is missing; copy it here"
                )
            self._files[path] = self._open(path)
        return self._files[path]

    def _find(self, name: str) -> TensorFile:
        """The open file that holds a tensor."""
        if name not in self._names:
            raise CheckpointError(
                self._directory, name, "is in no weight file, though config.json calls for it; "
                "the checkpoint is incomplete or of another model"
            )  # fmt: skip
        path = self._where[name]
        file = self._file(path, name)
        if name not in file.names():
            raise CheckpointError(
                path, name, "the index places it in this file, but it is not there; copy it again"
            )
        return file

    @property
    def source_format(self) -> str:
        """Format and stored dtype of the files opened so far, and how many files there are."""
        labels = {file.label for file in self._files.values()}
        dtypes = {file.dtype(name) for file in self._files.values() for name in file.names()}
        if not dtypes:
            dtypes = {str(self.config.get("dtype") or self.config.get("torch_dtype"))}
        count = len(set(self._where.values()))
        files = f"{count} files" if count != 1 else "one file"
        return f"{'/'.join(sorted(labels)) or 'weights'} {'/'.join(sorted(dtypes))}, {files}"

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._find(name).shape(name)

    def dtype(self, name: str) -> str:
        """See `Checkpoint`."""
        return self._find(name).dtype(name)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return self._find(name).nbytes(name)

    def place(self, name: str) -> Place:
        """See `Checkpoint`."""
        return self._find(name).place(name)

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`."""
        file = self._find(name)
        dtype = file.dtype(name)
        check_dtype(self._where[name], name, dtype, is_integer=dtype in INTEGER_NAMES.values())
        return file.read(name)

    def validate(
        self, wanted: Iterable[tuple[str, tuple[int, ...]]], integers: Container[str] = ()
    ) -> None:
        """See `Checkpoint`."""
        for name, shape in wanted:
            file, path = self._find(name), self._where[name]
            check_shape(path, name, expected=shape, found=file.shape(name))
            check_dtype(path, name, file.dtype(name), is_integer=name in integers)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._files = {}

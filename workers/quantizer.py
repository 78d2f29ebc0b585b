"""Quantises a checkpoint into a new one, layer by layer, in the layout of compressed-tensors.

One linear layer is in memory in fp32 at a time, and one block packed. Every block becomes a file of
its own, so that a stage opens the files of its layers only. What is finished is noted with its
checksum in `quantize.json`: after an interruption the same command goes on where it was.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.kernels.formats import WEIGHT_BITS, Format, default_group_size
from tightfit.kernels.groups import INT8_MIDDLE, Quantized, round_to_nearest
from tightfit.kernels.weights import quantize_rows
from tightfit.workers.api import LoadProgress
from tightfit.workers.checkpoint import Checkpoint, find_prefix, open_checkpoint
from tightfit.workers.checkpoints.written import file_hash, stored_tensors, write_file
from tightfit.workers.decoder_config import LinearShape, decoder_config
from tightfit.workers.errors import CheckpointError
from tightfit.workers.model_formats import common_group_size
from tightfit.workers.stored import Packing, StoredScheme
from tightfit.workers.tokenizer_files import convert

MANIFEST = "quantize.json"
INDEX = "model.safetensors.index.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights that a model needs, but for the config and indexes."""
WEIGHT_INDEXES = (INDEX, "pytorch_model.bin.index.json", "config.json", MANIFEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """What is to be written where."""

    source: str
    """Checkpoint directory or GGUF file, not quantised."""
    target: str
    """Directory; made if it is not there."""
    format: str
    """`int8`, `int4` or `int3`."""
    group_size: int | None = None
    """Input features that share a scale; None: `common_group_size` of the model, else
    the default of each layer; 0: one scale for each output channel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeResult:
    """What was written."""

    num_layers: int
    resumed_files: int
    """Files that were there already, whole."""
    source_bytes: int
    """Of the tensors that were read or had been."""
    written_bytes: int
    """Of all weight files."""
    bits_per_weight: float
    """Of the blocks' linear layers, with scales and zero points."""
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What becomes one file."""

    label: str
    linears: tuple[LinearShape, ...]
    """Quantised."""
    others: tuple[str, ...]
    """Names of tensors that are kept, without prefix."""


def quantize_checkpoint(
    job: QuantizeJob, progress: Callable[[LoadProgress], None] | None = None
) -> QuantizeResult:
    """Write the quantised checkpoint, or what is still missing of it.

    Raises:
        CheckpointError: the source cannot be read or is quantised already, the format cannot be
            written, or the target holds something else.
    """
    checkpoint = open_checkpoint(job.source)
    try:
        return _Run(job, checkpoint, progress).run()
    finally:
        checkpoint.close()


class _Run:
    """One job on one open checkpoint."""

    def __init__(
        self,
        job: QuantizeJob,
        checkpoint: Checkpoint,
        progress: Callable[[LoadProgress], None] | None,
    ) -> None:
        self._job, self._checkpoint, self._report = job, checkpoint, progress
        self._source, self._target = Path(job.source), Path(job.target)
        self._config = decoder_config(checkpoint.config)
        if self._config.stored is not None:
            problem = f"is quantised already, by {self._config.stored.method}; give the original"
            raise CheckpointError(self._source, None, problem)
        self._prefix = find_prefix(checkpoint, self._config, self._source)
        self._pieces = tuple(self._all_pieces())
        checkpoint.validate((self._full(name), shape) for name, shape in self._all_tensors())
        self._total = sum(self._piece_bytes(piece) for piece in self._pieces)
        self._done = 0
        self._started_s = time.monotonic()
        self._files: dict[str, dict[str, Any]] = {}

    # -- what there is to do -----------------------------------------------------------------

    def _full(self, name: str) -> str:
        """As the source has it."""
        return self._config.full_name(name, self._prefix)

    def _written(self, name: str) -> str:
        """As transformers names it."""
        return self._config.full_name(name, self._config.names.prefixes[0])

    def _all_tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self._config
        yield from config.embedding_tensors()
        for i in range(config.num_layers):
            yield from config.layer_tensors(i)
        yield from config.head_tensors()

    def _all_pieces(self) -> Iterator[_Piece]:
        config = self._config
        outer = [name for name, _ in config.embedding_tensors()]
        yield _Piece(label="embedding", linears=(), others=tuple(outer))
        for i in range(config.num_layers):
            linears = tuple(config.layer_linears(i))
            weights = {f"{linear.name}.weight" for linear in linears}
            others = (name for name, _ in config.layer_tensors(i) if name not in weights)
            yield _Piece(label=f"layer {i}", linears=linears, others=tuple(others))
        head = (name for name, _ in config.head_tensors() if name not in outer)
        yield _Piece(label="head", linears=(), others=tuple(head))

    def _piece_bytes(self, piece: _Piece) -> int:
        names = [*piece.others, *(f"{linear.name}.weight" for linear in piece.linears)]
        return sum(self._checkpoint.nbytes(self._full(name)) for name in names)

    def _scheme(self, n_in: int) -> StoredScheme:
        fmt, size = Format(self._job.format), self._job.group_size
        if fmt not in WEIGHT_BITS:
            return StoredScheme(packing=Packing.WORDS, bits=8, group_size=None, is_symmetric=True)
        if size is None:
            size = common_group_size(self._config) or default_group_size(n_in)
        return StoredScheme(
            packing=Packing.DENSE_3 if fmt is Format.INT3 else Packing.WORDS,
            bits=WEIGHT_BITS[fmt],
            group_size=size or None,
        )

    # -- doing it ----------------------------------------------------------------------------

    def run(self) -> QuantizeResult:
        """All pieces, then what makes them a checkpoint."""
        self._check()
        self._target.mkdir(parents=True, exist_ok=True)
        finished = self._finished()
        for torn in self._target.glob("*.part"):
            torn.unlink()
        resumed = 0
        for number, piece in enumerate(self._pieces, 1):
            name = f"model-{number:05}-of-{len(self._pieces):05}.safetensors"
            self._note(piece.label)
            if self._is_whole(name, finished.get(name)):
                self._files[name] = finished[name]
                resumed += 1
            else:
                tensors = self._piece_tensors(piece)
                digest = write_file(self._target / name, tensors)
                self._files[name] = {"sha256": digest, "tensors": sorted(tensors)}
            self._done += self._piece_bytes(piece)
            self._save_manifest()
        self._note("config and tokenizer")
        self._copy_files()
        self._write_index()
        self._write_config()  # last: without it there is no model that could be served
        return self._result(resumed)

    def _check(self) -> None:
        size = self._job.group_size
        for linear in self._config.layer_linears(0):
            if size and linear.n_in % size:
                raise CheckpointError(
                    self._source,
                    linear.name,
                    f"has {linear.n_in} input features, which groups of {size} do not divide; "
                    "leave the group size out, and each layer gets one that does",
                )
        if self._target.resolve() in (self._source.resolve(), self._source.resolve().parent):
            raise CheckpointError(self._target, None, "is the source; choose another directory")

    def _piece_tensors(self, piece: _Piece) -> dict[str, Tensor]:
        tensors = {}
        for name in piece.others:
            tensors[self._written(name)] = self._read(name).to(torch.bfloat16).contiguous()
        for linear in piece.linears:
            scheme = self._scheme(linear.n_in)
            try:
                weight = _quantized(self._read(f"{linear.name}.weight"), scheme)
            except ValueError as error:
                raise CheckpointError(self._source, linear.name, str(error)) from error
            for suffix, tensor in stored_tensors(weight, scheme).items():
                tensors[self._written(f"{linear.name}.{suffix}")] = tensor
        return tensors

    def _read(self, name: str) -> Tensor:
        return self._checkpoint.read(self._full(name))

    def _note(self, message: str) -> None:
        if self._report is not None:
            self._report(
                LoadProgress(
                    phase="quantising",
                    bytes_done=self._done,
                    bytes_total=self._total,
                    elapsed_s=time.monotonic() - self._started_s,
                    message=message,
                )
            )

    # -- the manifest ------------------------------------------------------------------------

    def _identity(self) -> dict[str, Any]:
        """What a manifest must agree with, for its files to be ours."""
        return {
            "format": self._job.format,
            "group_size": self._job.group_size,
            "config": dict(self._checkpoint.config),
            "bytes": self._total,
        }

    def _finished(self) -> dict[str, dict[str, Any]]:
        """Files of an earlier run of the same job."""
        path = self._target / MANIFEST
        if not path.exists():
            strange = sorted(file.name for file in self._target.iterdir() if file.suffix != ".part")
            if strange:
                raise CheckpointError(
                    self._target,
                    None,
                    f"is not empty ({', '.join(strange[:3])}); choose another directory",
                )
            return {}
        try:
            manifest = json.loads(path.read_text())
            identity, files = manifest["identity"], dict(manifest["files"])
        except (ValueError, TypeError, KeyError) as error:
            problem = f"cannot be read ({error!r}); remove the directory to begin again"
            raise CheckpointError(path, None, problem) from error
        if identity != json.loads(json.dumps(self._identity())):
            raise CheckpointError(
                self._target,
                None,
                "holds the beginning of another job (other model, format or group size); choose "
                "another directory, or remove it",
            )
        return files

    def _is_whole(self, name: str, noted: Mapping[str, Any] | None) -> bool:
        path = self._target / name
        return noted is not None and path.exists() and file_hash(path) == noted.get("sha256")

    def _save_manifest(self) -> None:
        self._save_json(MANIFEST, {"identity": self._identity(), "files": self._files})

    def _save_json(self, name: str, content: Mapping[str, Any]) -> None:
        fresh = self._target / f"{name}.part"
        fresh.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(fresh, self._target / name)

    # -- what makes the files a checkpoint ---------------------------------------------------

    def _copy_files(self) -> None:
        if self._source.is_dir():
            for pattern in COPIED:
                for file in self._source.glob(pattern):
                    if file.name not in WEIGHT_INDEXES:
                        shutil.copyfile(file, self._target / file.name)
            return
        with tempfile.TemporaryDirectory() as work:
            made = Path(work) / "tokenizer"
            convert(self._source, made)
            for file in made.iterdir():
                shutil.copyfile(file, self._target / file.name)

    def _write_index(self) -> None:
        weight_map = {
            tensor: name for name, file in self._files.items() for tensor in file["tensors"]
        }
        total = sum((self._target / name).stat().st_size for name in self._files)
        self._save_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _write_config(self) -> None:
        config = {**self._checkpoint.config, "quantization_config": self._quantization_config()}
        config.pop("torch_dtype", None)
        self._save_json("config.json", {**config, "dtype": "bfloat16"})

    def _quantization_config(self) -> dict[str, Any]:
        groups: dict[StoredScheme, list[str]] = {}
        for name, n_in in self._templates():
            groups.setdefault(self._scheme(n_in), []).append(name)
        return {
            "quant_method": "compressed-tensors",
            "format": str(next(iter(groups)).packing.value),
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {
                f"group_{i}": _config_group(scheme, names)
                for i, (scheme, names) in enumerate(groups.items())
            },
        }

    def _templates(self) -> Iterator[tuple[str, int]]:
        """A pattern for the names of each linear layer of a block, and its input features."""
        n = self._config.names
        names = (*n.qkv, n.attn_out, *n.mlp_up, n.mlp_down)
        for name, linear in zip(names, self._config.layer_linears(0), strict=True):
            yield f"re:.*{re.escape(name).replace(re.escape('{i}'), '[0-9]+')}$", linear.n_in

    def _result(self, resumed: int) -> QuantizeResult:
        linears = [linear for piece in self._pieces for linear in piece.linears]
        weights = sum(linear.n_out * linear.n_in for linear in linears)
        bits = sum(_bits(self._scheme(linear.n_in), linear) for linear in linears)
        return QuantizeResult(
            num_layers=self._config.num_layers,
            resumed_files=resumed,
            source_bytes=self._total,
            written_bytes=sum((self._target / name).stat().st_size for name in self._files),
            bits_per_weight=bits / weights,
            elapsed_s=time.monotonic() - self._started_s,
        )


def _quantized(weight: Tensor, scheme: StoredScheme) -> Quantized:
    if scheme.bits == 8:
        rows = quantize_rows(weight)
        integers = rows.values.view(torch.uint8).add(INT8_MIDDLE)
        scale = rows.scale[:, None]
        return Quantized(
            bits=8,
            integers=integers,
            scale=scale,
            zero_point=torch.full_like(scale, INT8_MIDDLE),
        )
    return round_to_nearest(weight, bits=scheme.bits, group_size=scheme.group_size)


def _config_group(scheme: StoredScheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.is_symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "format": str(scheme.packing.value), "weights": weights}


def _bits(scheme: StoredScheme, linear: LinearShape) -> int:
    """Of one layer in the files."""
    groups = linear.n_out * scheme.num_groups(linear.n_in)
    zero_bits = (
        0 if scheme.is_symmetric else 8 if scheme.packing is Packing.DENSE_3 else scheme.bits
    )
    return scheme.bits * linear.n_out * linear.n_in + groups * (16 + zero_bits)

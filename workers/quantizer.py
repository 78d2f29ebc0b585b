"""Quantises a checkpoint into a new one, layer by layer, in the layout of compressed-tensors.

One linear layer is in memory in fp32 at a time, and one block packed. Every block becomes a file of
its own, so that a stage opens the files of its layers only. What is finished is noted with its
checksum in `quantize.json`: after an interruption the same command goes on where it was.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tightfit.kernels.formats import WEIGHT_BITS, Format
from tightfit.kernels.groups import Quantized
from tightfit.workers.api import LoadProgress
from tightfit.workers.calibration import CalibratedRounding, Calibration
from tightfit.workers.checkpoint import (
    Checkpoint,
    find_prefix,
    open_checkpoint,
    unquantized_config,
)
from tightfit.workers.checkpoints.written import stored_tensors, write_file
from tightfit.workers.decoder_config import LinearShape, decoder_config
from tightfit.workers.errors import CheckpointError
from tightfit.workers.manifest import MANIFEST, Manifest, save_json
from tightfit.workers.quantized_config import (
    check_group_size,
    quantization_config,
    stored_bits,
    written_group_size,
    written_scheme,
)
from tightfit.workers.rounding import round_weight
from tightfit.workers.sample_choice import choose_samples, mean_embeddings
from tightfit.workers.sensitivity import FILE_NAME, FormatMix, Unit, model_units
from tightfit.workers.stored import StoredScheme
from tightfit.workers.tokenizer_files import convert

__all__ = [
    "Calibration",
    "QuantizeJob",
    "QuantizeResult",
    "context_tokens",
    "pick_samples",
    "quantize_checkpoint",
]

INDEX = "model.safetensors.index.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt")
"""Files beside the weights that a model needs, but for the config and indexes."""
NOT_COPIED = (INDEX, "pytorch_model.bin.index.json", "config.json", MANIFEST, FILE_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """What is to be written where."""

    source: str
    """Checkpoint directory or GGUF file, not quantised."""
    target: str
    """Directory; made if it is not there."""
    format: str | None = None
    """Of all blocks' linear layers: `int8`, `int4` or `int3`; None: `mix` says."""
    mix: FormatMix | None = None
    """Of each."""
    group_size: int | None = None
    """Input features that share a scale; None: `common_group_size` of the model, else
    the default of each layer; 0: one scale for each output channel."""
    method: str = "rtn"
    """How `int4` and `int3` are rounded: "rtn" (to nearest), "hqq" or "gptq"."""
    calibration: Calibration | None = None
    """What gptq rounds for."""


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
    """Of the blocks' linear layers in the files, with scales and zero points."""
    held_bits_per_weight: float
    """The same in a stage's memory."""
    elapsed_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """What becomes one file."""

    label: str
    linears: tuple[LinearShape, ...]
    """Quantised."""
    others: tuple[str, ...]
    """Names of tensors that are kept, without prefix."""
    layer: int | None = None
    """Number of the block that it is."""


def pick_samples(
    source: str | Path, pool: Sequence[Sequence[int]], count: int, *, hardest: bool
) -> list[Sequence[int]]:
    """Samples of a pool by their distance to prototypes; see `sample_choice`.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be read.
    """
    checkpoint = open_checkpoint(source)
    try:
        config = decoder_config(checkpoint.config)
        vectors = mean_embeddings(checkpoint, config, source, pool)
    finally:
        checkpoint.close()
    return [pool[index] for index in choose_samples(vectors, count, hardest=hardest)]


def context_tokens(source: str | Path) -> int:
    """Most tokens that a model takes.

    Raises:
        CheckpointError, UnsupportedModelError: the model cannot be read.
    """
    checkpoint = open_checkpoint(source)
    try:
        return decoder_config(checkpoint.config).max_position
    finally:
        checkpoint.close()


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
        self._config = unquantized_config(checkpoint, self._source)
        self._prefix = find_prefix(checkpoint, self._config, self._source)
        self._mix = self._formats()
        self._schemes = {
            name: self._scheme(unit) for unit in model_units(self._config) for name in unit.names
        }
        """By the names of linear layers, without prefix."""
        pieces = tuple(self._all_pieces())
        self._named = {
            f"model-{number:05}-of-{len(pieces):05}.safetensors": piece
            for number, piece in enumerate(pieces, 1)
        }
        """By the names of their files."""
        checkpoint.validate((self._full(name), shape) for name, shape in self._all_tensors())
        self._total = sum(self._piece_bytes(piece) for piece in pieces)
        self._calibrated = self._calibrated_rounding()
        self._done = 0
        self._started_s = time.monotonic()

    def _formats(self) -> FormatMix:
        job, num_layers = self._job, self._config.num_layers
        if (job.format is None) == (job.mix is None):
            raise CheckpointError(self._source, None, "wants one format, or else a mix of them")
        if job.mix is None:
            units = model_units(self._config)
            return ({unit.role: Format(str(job.format)) for unit in units},) * num_layers
        if len(job.mix) != num_layers:
            problem = f"has {num_layers} layers, and the mix of formats is for {len(job.mix)}"
            raise CheckpointError(self._source, None, problem)
        return job.mix

    def _calibrated_rounding(self) -> CalibratedRounding | None:
        job = self._job
        if job.method != "rtn" and job.format is not None and Format(job.format) not in WEIGHT_BITS:
            problem = f"{job.format} is rounded to nearest; {job.method} is for int4 and int3"
            raise CheckpointError(self._source, None, problem)
        if (job.method == "gptq") != (job.calibration is not None):
            problem = "gptq needs samples to calibrate with, and no other method takes any"
            raise CheckpointError(self._source, None, problem)
        if job.calibration is None:
            return None
        return CalibratedRounding(
            self._checkpoint, self._config, self._source, job.calibration, self._target
        )

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
            yield _Piece(label=f"layer {i}", linears=linears, others=tuple(others), layer=i)
        head = (name for name, _ in config.head_tensors() if name not in outer)
        yield _Piece(label="head", linears=(), others=tuple(head))

    def _piece_bytes(self, piece: _Piece) -> int:
        names = [*piece.others, *(f"{linear.name}.weight" for linear in piece.linears)]
        return sum(self._checkpoint.nbytes(self._full(name)) for name in names)

    def _scheme(self, unit: Unit) -> StoredScheme:
        return written_scheme(
            self._mix[unit.layer][unit.role],
            group_size=written_group_size(self._config, self._job.group_size, unit.n_in),
            method=self._job.method,
        )

    # -- doing it ----------------------------------------------------------------------------

    def run(self) -> QuantizeResult:
        """All pieces, then what makes them a checkpoint."""
        self._check()
        self._target.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(self._target, self._identity())
        for torn in self._target.glob("*.part"):
            torn.unlink()
        resumed = self._resume(manifest)
        for name, piece in self._named.items():
            self._note(piece.label)
            if name not in manifest.files:
                tensors = self._piece_tensors(piece)
                digest = write_file(self._target / name, tensors)
                manifest.add(name, digest, sorted(tensors))
            self._done += self._piece_bytes(piece)
            if self._calibrated is not None and piece.layer is not None:
                self._calibrated.drop_states(before=piece.layer + 1)
        self._note("config and tokenizer")
        self._copy_files()
        self._write_index(manifest)
        self._write_config()  # last: without it there is no model that could be served
        return self._result(resumed)

    def _resume(self, manifest: Manifest) -> int:
        """Take over an earlier run's files, as many as can be gone on from; their number."""
        if self._calibrated is None:
            return sum(manifest.take_over(name) for name in self._named)
        missing: int | None = None
        for name, piece in self._named.items():
            is_ready = piece.layer is None or missing is None
            if not (is_ready and manifest.take_over(name)) and missing is None:
                missing = piece.layer
        if missing is not None and not self._calibrated.has_states(missing):
            for name, piece in self._named.items():
                if piece.layer is not None:
                    manifest.forget(name)
            self._note("calibration text through the embedding")
            self._calibrated.start()
        return len(manifest.files)

    def _identity(self) -> dict[str, Any]:
        """What a manifest must agree with, for its files to be ours."""
        calibration = self._job.calibration
        return {
            "format": self._job.format,
            "mix": None if self._job.mix is None else [dict(layer) for layer in self._job.mix],
            "group_size": self._job.group_size,
            "config": dict(self._checkpoint.config),
            "bytes": self._total,
            "method": self._job.method,
            "calibration": None
            if calibration is None
            else [calibration.digest, calibration.damping, calibration.act_order],
        }

    def _check(self) -> None:
        check_group_size(self._config, self._job.group_size, self._source)
        if self._target.resolve() in (self._source.resolve(), self._source.resolve().parent):
            raise CheckpointError(self._target, None, "is the source; choose another directory")

    def _piece_tensors(self, piece: _Piece) -> dict[str, Tensor]:
        tensors = {}
        for name in piece.others:
            tensors[self._written(name)] = self._read(name).to(torch.bfloat16).contiguous()
        rounded = self._rounded(piece)
        for linear in piece.linears:
            scheme = self._schemes[linear.name]
            weight = rounded.get(linear.name) or self._rounded_alone(linear, scheme)
            for suffix, tensor in stored_tensors(weight, scheme).items():
                tensors[self._written(f"{linear.name}.{suffix}")] = tensor
        return tensors

    def _rounded(self, piece: _Piece) -> dict[str, Quantized]:
        """A block's linear layers, rounded together for their inputs, if that is wanted."""
        if self._calibrated is None or piece.layer is None:
            return {}
        schemes = {
            unit.role: self._schemes[unit.names[0]]
            for unit in model_units(self._config)
            if unit.layer == piece.layer
        }
        return self._calibrated.round_layer(piece.layer, schemes, self._note)

    def _rounded_alone(self, linear: LinearShape, scheme: StoredScheme) -> Quantized:
        try:
            weight = self._read(f"{linear.name}.weight")
            return round_weight(weight, scheme, is_fitted=self._job.method == "hqq")
        except ValueError as error:
            raise CheckpointError(self._source, linear.name, str(error)) from error

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

    # -- what makes the files a checkpoint ---------------------------------------------------

    def _copy_files(self) -> None:
        if self._source.is_dir():
            for pattern in COPIED:
                for file in self._source.glob(pattern):
                    if file.name not in NOT_COPIED:
                        shutil.copyfile(file, self._target / file.name)
            return
        with tempfile.TemporaryDirectory() as work:
            made = Path(work) / "tokenizer"
            convert(self._source, made)
            for file in made.iterdir():
                shutil.copyfile(file, self._target / file.name)

    def _write_index(self, manifest: Manifest) -> None:
        weight_map = {
            tensor: name for name, file in manifest.files.items() for tensor in file["tensors"]
        }
        total = {"total_size": self._written_bytes()}
        save_json(self._target / INDEX, {"metadata": total, "weight_map": weight_map})

    def _written_bytes(self) -> int:
        return sum((self._target / name).stat().st_size for name in self._named)

    def _write_config(self) -> None:
        config = {
            **self._checkpoint.config,
            "quantization_config": quantization_config(self._config, self._schemes),
        }
        config.pop("torch_dtype", None)
        save_json(self._target / "config.json", {**config, "dtype": "bfloat16"})

    def _result(self, resumed: int) -> QuantizeResult:
        linears = [linear for piece in self._named.values() for linear in piece.linears]
        units = model_units(self._config)
        num_weights = sum(unit.num_weights for unit in units)
        bits = sum(stored_bits(self._schemes[linear.name], linear) for linear in linears)
        held = sum(
            unit.nbytes(self._mix[unit.layer][unit.role], self._schemes[unit.names[0]].group_size)
            for unit in units
        )
        return QuantizeResult(
            num_layers=self._config.num_layers,
            resumed_files=resumed,
            source_bytes=self._total,
            written_bytes=self._written_bytes(),
            bits_per_weight=bits / num_weights,
            held_bits_per_weight=8 * held / num_weights,
            elapsed_s=time.monotonic() - self._started_s,
        )

"""The door to checkpoints: tensors by name, read one at a time, through read-only memory maps.

No reader holds a file's contents: what `read` returns is backed by the page cache, or is one tensor
widened. Names are Hugging Face's, whatever the files are.
"""

from __future__ import annotations

from pathlib import Path

from tightfit.workers.checkpoints.base import Checkpoint, Place
from tightfit.workers.checkpoints.directory import DirectoryCheckpoint, read_index
from tightfit.workers.checkpoints.safetensors import SafetensorsFile
from tightfit.workers.checkpoints.torch_bin import TorchFile
from tightfit.workers.decoder_config import DecoderConfig, decoder_config
from tightfit.workers.errors import CheckpointError

__all__ = ["Checkpoint", "Place", "find_prefix", "open_checkpoint", "unquantized_config"]


def unquantized_config(checkpoint: Checkpoint, path: str | Path) -> DecoderConfig:
    """The model's configuration, if its weights are as they were trained.

    Raises:
        CheckpointError: they are quantised.
        UnsupportedModelError: a family or setting that is not supported.
    """
    config = decoder_config(checkpoint.config)
    if config.stored is not None and not config.stored.is_read_widened:
        problem = f"is quantised already, by {config.stored.method}; give the original"
        raise CheckpointError(path, None, problem)
    return config


def find_prefix(checkpoint: Checkpoint, config: DecoderConfig, path: str | Path) -> str:
    """What stands before the model's names in this checkpoint.

    Raises:
        CheckpointError: there is no embedding under any name that the family has.
    """
    present, n = checkpoint.names(), config.names
    for prefix in n.prefixes:
        if f"{prefix}{n.embedding}.weight" in present:
            return prefix
    candidates = " or ".join(f"{prefix}{n.embedding}.weight" for prefix in n.prefixes)
    raise CheckpointError(
        path, None, f"there is no tensor {candidates}; is it a {n.head} model of the "
        f"{config.family} family, complete?"
    )  # fmt: skip


def open_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint directory (safetensors or .bin, single or sharded, or one GGUF), or a GGUF file.

    Where a directory has several, safetensors go before .bin, and both before GGUF. The config and
    the index are checked now, a file of weights when one of its tensors is first asked for.

    Raises:
        CheckpointError: nothing usable is there; names the file and what to do.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix != ".gguf":
            problem = "is no checkpoint; give the model's directory, or a .gguf file"
            raise CheckpointError(path, None, problem)
        return _open_gguf(path)
    if not path.is_dir():
        raise CheckpointError(path, None, "there is no such file or directory")
    for stem, suffix, open_file in (
        ("model", "safetensors", SafetensorsFile),
        ("pytorch_model", "bin", TorchFile),
    ):
        index, single = path / f"{stem}.{suffix}.index.json", path / f"{stem}.{suffix}"
        if index.exists():
            return DirectoryCheckpoint(path, read_index(index), open_file)
        if single.exists():
            return DirectoryCheckpoint(path, single, open_file)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return _open_gguf(ggufs[0])
    if ggufs:
        listed = ", ".join(file.name for file in ggufs)
        raise CheckpointError(path, None, f"holds several GGUF files ({listed}); name one of them")
    raise CheckpointError(
        path,
        None,
        "holds no weights: no model.safetensors, pytorch_model.bin, index of either, or .gguf file",
    )


def _open_gguf(path: Path) -> Checkpoint:
    # Imported here: the gguf package is slow to import, and most checkpoints are none.
    from tightfit.workers.checkpoints.gguf import GGUFCheckpoint

    return GGUFCheckpoint(path)

"""The embedding's table, held by a stage or left in the checkpoint's file.

V tokens, E features, T rows looked up. A step reads T rows of it: BLOOM-176B's 7.2 GB, say, for the
28 KB of one token. Left in the file, mapped read-only, the rows that are used stay in the page
cache, which the kernel takes back when something else needs the memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tightfit.workers.api import StageSpec
from tightfit.workers.checkpoint import Checkpoint, find_prefix
from tightfit.workers.checkpoints.base import DTYPE_NAMES
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.model_formats import ModelFormats
from tightfit.workers.shard_bytes import table_bytes


def stays_in_file(checkpoint: Checkpoint, name: str) -> bool:
    """Whether what `checkpoint.read` returns of this tensor is a view of its file: quants of a GGUF
    are widened. Tensors of less than 1 MiB are copied, and count for nothing."""
    return checkpoint.dtype(name) in DTYPE_NAMES.values()


def widened_bytes(
    checkpoint: Checkpoint, config: DecoderConfig, formats: ModelFormats, spec: StageSpec
) -> int:
    """Host memory that a stage needs for an embedding that is to be on the host and cannot stay in
    its file.

    Raises:
        CheckpointError: there is no embedding in the checkpoint.
    """
    if not (spec.is_first and formats.embedding_on_host):
        return 0
    prefix = find_prefix(checkpoint, config, spec.model_path)
    name = config.full_name(f"{config.names.embedding}.weight", prefix)
    return 0 if stays_in_file(checkpoint, name) else table_bytes(config, formats)


class EmbeddingTable:
    """V rows of E features.

    Args:
        table: [V, E], of any floating dtype and strides; on the CPU or on `device`.
        dtype: of the rows that are looked up.
        device: where they are wanted, a torch device name.
    """

    def __init__(self, table: Tensor, *, dtype: torch.dtype, device: str) -> None:
        self.table = table
        self._dtype, self._device = dtype, device

    @property
    def nbytes(self) -> int:
        """Bytes of the table, wherever it is."""
        return self.table.nbytes

    def __call__(self, token_ids: Tensor) -> Tensor:
        """[T] whole numbers below V → [T, E]."""
        rows = self.table.index_select(0, token_ids.to(self.table.device))
        return rows.to(self._device, self._dtype)

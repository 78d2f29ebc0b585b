"""Whether a file that was made for a model belongs to this one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from tightfit.workers.checkpoint import Checkpoint, find_prefix, open_checkpoint, unquantized_config
from tightfit.workers.decoder_config import DecoderConfig
from tightfit.workers.errors import SensitivityError
from tightfit.workers.sensitivity import Sensitivities


def check_model(sensitivities: Sensitivities, source: str | Path, path: Path) -> None:
    """Refuse sensitivities that were measured on another model than `source`.

    Args:
        sensitivities: read from `path`.
        source: checkpoint directory or GGUF file.

    Raises:
        SensitivityError: they were.
        CheckpointError, UnsupportedModelError: the model cannot be read.
    """
    checkpoint = open_checkpoint(source)
    try:
        config = unquantized_config(checkpoint, source)
        if model_digest(checkpoint, config, source) != sensitivities.model:
            problem = f"was measured on another model than {source}; measure this one"
            raise SensitivityError(path, problem)
    finally:
        checkpoint.close()


def model_digest(checkpoint: Checkpoint, config: DecoderConfig, path: str | Path) -> str:
    """SHA-256 of a model's config and of its first block's norms, which training changes too: the
    same for the same model in whatever files, at the cost of a few kilobytes read."""
    digest = hashlib.sha256(json.dumps(dict(checkpoint.config), sort_keys=True).encode())
    prefix = find_prefix(checkpoint, config, path)
    for norm in (config.names.attn_norm, config.names.mlp_norm):
        for name, _ in config.norm_tensors(norm.format(i=0)):
            values = checkpoint.read(config.full_name(name, prefix)).float()
            digest.update(values.contiguous().numpy().tobytes())
    return digest.hexdigest()

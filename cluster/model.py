"""What is known of a model before any of its weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tightfit.cluster.hub import resolve_model
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import DecoderConfig, decoder_config


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """A checkpoint, described."""

    path: Path
    config: DecoderConfig
    source_format: str
    """What its files hold."""


def describe_model(model: str) -> ModelDescription:
    """Find and describe the checkpoint that MODEL names.

    Raises:
        ConfigError: nothing is there.
        WorkerError: it cannot be read, or its family or a setting is not supported.
    """
    path = resolve_model(model)
    checkpoint = open_checkpoint(path)
    try:
        return ModelDescription(
            path=path,
            config=decoder_config(checkpoint.config),
            source_format=checkpoint.source_format,
        )
    finally:
        checkpoint.close()

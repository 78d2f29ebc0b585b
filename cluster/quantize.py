"""The command `tightfit quantize`: shows how far it has come, and what was written."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path

from tightfit.cluster.config import QuantizeConfig
from tightfit.cluster.hub import resolve_model
from tightfit.cluster.progress import LoadView
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.quantizer import QuantizeJob, QuantizeResult, quantize_checkpoint


def quantize(config: QuantizeConfig, *, as_json: bool = False) -> int:
    """Quantise, and print a summary to standard output; returns the exit code.

    Raises:
        ConfigError: there is no such model.
        WorkerError: see `quantize_checkpoint`.
    """
    job = QuantizeJob(
        source=str(resolve_model(config.model)),
        target=config.out,
        format=config.format,
        group_size=config.group_features,
    )
    label = Path(config.model).name
    with LoadView([label]) as view:
        result = quantize_checkpoint(job, partial(view.update, label))
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "path": config.out}, indent=2))
    else:
        print(_summary(config, result))
    return 0


def _summary(config: QuantizeConfig, result: QuantizeResult) -> str:
    resumed = f", {result.resumed_files} files were there" if result.resumed_files else ""
    return (
        f"{config.out}: {result.num_layers} layers in {config.format}, "
        f"{result.bits_per_weight:.2f} bits per weight, {format_bytes(result.written_bytes)} "
        f"(from {format_bytes(result.source_bytes)}) in {format_seconds(result.elapsed_s)}{resumed}"
    )

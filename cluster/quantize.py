"""The command `tightfit quantize`: shows how far it has come, and what was written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from tightfit.cluster.calibration_text import spread, text_samples
from tightfit.cluster.config import QuantizeConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.hub import resolve_model
from tightfit.cluster.progress import LoadView
from tightfit.cluster.tokenizer import load_tokenizer
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.model_formats import AUTO
from tightfit.workers.quantizer import (
    Calibration,
    QuantizeJob,
    QuantizeResult,
    context_tokens,
    pick_samples,
    quantize_checkpoint,
)


def quantize(config: QuantizeConfig, *, as_json: bool = False) -> int:
    """Quantise, and print a summary to standard output; returns the exit code.

    Raises:
        ConfigError: there is no such model.
        WorkerError: see `quantize_checkpoint`.
    """
    model = resolve_model(config.model)
    job = QuantizeJob(
        source=str(model),
        target=config.out,
        format=config.format,
        group_size=config.group_features,
        method=_method(config),
        calibration=_calibration(config, model),
    )
    label = Path(config.model).name
    with LoadView([label]) as view:
        result = quantize_checkpoint(job, partial(view.update, label))
    if as_json:
        print(json.dumps({**dataclasses.asdict(result), "path": config.out}, indent=2))
    else:
        print(_summary(config, result))
    return 0


def _method(config: QuantizeConfig) -> str:
    has_text = config.calibration is not None
    method = config.method
    if method == AUTO:
        return "gptq" if has_text else "rtn"
    if method == "gptq" and not has_text:
        raise ConfigError("quantize.calibration is missing: gptq needs a text to calibrate with")
    if method != "gptq" and has_text:
        raise ConfigError(f"quantize.calibration is for gptq; {method} takes none")
    return method


def _calibration(config: QuantizeConfig, model: Path) -> Calibration | None:
    if config.calibration is None:
        return None
    num_tokens = min(config.sample_tokens, context_tokens(model))
    pool = text_samples(Path(config.calibration), load_tokenizer(model), num_tokens)
    samples: Sequence[Sequence[int]]
    if config.sample_choice == "spread":
        samples = spread(pool, config.samples)
    else:
        is_hardest = config.sample_choice == "hard"
        samples = pick_samples(model, pool, config.samples, hardest=is_hardest)
    return Calibration(samples=samples, damping=config.damping, act_order=config.act_order)


def _summary(config: QuantizeConfig, result: QuantizeResult) -> str:
    resumed = f", {result.resumed_files} files were there" if result.resumed_files else ""
    return (
        f"{config.out}: {result.num_layers} layers in {config.format}, "
        f"{result.bits_per_weight:.2f} bits per weight, {format_bytes(result.written_bytes)} "
        f"(from {format_bytes(result.source_bytes)}) in {format_seconds(result.elapsed_s)}{resumed}"
    )

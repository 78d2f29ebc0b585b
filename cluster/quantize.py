"""The command `tightfit quantize`: shows how far it has come, and what was written."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tightfit.cluster.calibration_text import CalibrationText, spread
from tightfit.cluster.config import QuantizeConfig
from tightfit.cluster.errors import ConfigError
from tightfit.cluster.hub import resolve_model
from tightfit.cluster.planning.mix import mix_for_bits
from tightfit.cluster.progress import LoadView
from tightfit.cluster.tokenizer import load_tokenizer
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.measuring import MeasureJob, measure_sensitivities
from tightfit.workers.model_formats import AUTO
from tightfit.workers.model_identity import check_model
from tightfit.workers.quantizer import (
    Calibration,
    QuantizeJob,
    QuantizeResult,
    context_tokens,
    pick_samples,
    quantize_checkpoint,
)
from tightfit.workers.sensitivity import (
    FILE_NAME,
    MIX_FORMATS,
    FormatMix,
    Sensitivities,
    load_sensitivities,
)

WINDOW_TOKENS = 512
"""Most tokens of a window that sensitivities are measured on."""
MOST_SENSITIVE = 5
"""Units that are named after measuring."""


def quantize(config: QuantizeConfig, *, as_json: bool = False) -> int:
    """Quantise or measure, and print a summary to standard output; returns the exit code.

    Raises:
        ConfigError: there is no such model, or settings that do not go together.
        PlacementError: the budget is too small for any mix.
        WorkerError: see `quantize_checkpoint` and `measure_sensitivities`.
    """
    work = _Work(config)
    if config.measure:
        measured = work.measure()
        print(_measured_json(config, measured) if as_json else _measured_summary(config, measured))
        return 0
    mix = work.mix()
    result = work.write(mix)
    if as_json:
        counts = {} if mix is None else {"mix": _counts(mix)}
        print(json.dumps({**dataclasses.asdict(result), "path": config.out, **counts}, indent=2))
    else:
        print(_summary(config, result, mix))
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """What there is to calibrate and to measure with."""

    calibration: Calibration | None
    windows: Sequence[Sequence[int]]


class _Work:
    """One command's model and text."""

    def __init__(self, config: QuantizeConfig) -> None:
        self._config, self._label = config, Path(config.model).name
        self._model = resolve_model(config.model)
        self._own_file = Path(config.out) / FILE_NAME
        self._given = self._given_sensitivities()
        self._method = self._chosen_method()
        self._text = self._read_text()

    def _given_sensitivities(self) -> Sensitivities | None:
        """Out of a file, unless they are to be measured."""
        config = self._config
        if config.budget is None:
            return None
        path = Path(config.sensitivity) if config.sensitivity is not None else self._own_file
        if config.sensitivity is None and (config.calibration is not None or not path.exists()):
            if config.calibration is None:
                raise ConfigError(
                    f"quantize.budget goes by sensitivities, and there is no {path}: give a text "
                    f"to measure them with as quantize.calibration, or a file of them as "
                    f"quantize.sensitivity"
                )
            return None
        found = load_sensitivities(path)
        check_model(found, self._model, path)
        if config.group_features not in (None, found.group_size):
            raise ConfigError(
                f"quantize.group_size is {config.group_size}, but {path} was measured with "
                f"{_group_name(found.group_size)}; leave it out, or measure anew"
            )
        return found

    @property
    def _measures(self) -> bool:
        return self._config.measure or (self._config.budget is not None and self._given is None)

    def _chosen_method(self) -> str:
        method, has_text = self._config.method, self._config.calibration is not None
        if method == AUTO:
            without_text = self._given.method if self._given is not None else "rtn"
            method = "gptq" if has_text else without_text
        if method == "gptq" and not has_text:
            raise ConfigError(
                "quantize.calibration is missing: gptq needs a text to calibrate with"
            )
        if method != "gptq" and has_text and not self._measures:
            raise ConfigError(f"quantize.calibration is for gptq; {method} takes none")
        return method

    def _read_text(self) -> _Text:
        config = self._config
        if config.calibration is None:
            return _Text(calibration=None, windows=())
        context = context_tokens(self._model)
        text = CalibrationText.read(Path(config.calibration), load_tokenizer(self._model))
        windows: Sequence[Sequence[int]] = ()
        if self._measures:
            size = min(WINDOW_TOKENS, context, config.measure_tokens)
            text, windows = text.hold_out(config.measure_tokens // size, size)
        calibration = None
        if self._method == "gptq":
            samples = self._samples(text.samples(min(config.sample_tokens, context)))
            calibration = Calibration(
                samples=samples, damping=config.damping, act_order=config.act_order
            )
        return _Text(calibration=calibration, windows=windows)

    def _samples(self, pool: list[list[int]]) -> Sequence[Sequence[int]]:
        config = self._config
        if config.sample_choice == "spread":
            return spread(pool, config.samples)
        is_hardest = config.sample_choice == "hard"
        return pick_samples(self._model, pool, config.samples, hardest=is_hardest)

    def measure(self) -> Sensitivities:
        """Measure, or read what this measured before."""
        job = MeasureJob(
            source=str(self._model),
            target=self._config.out,
            windows=self._text.windows,
            method=self._method,
            group_size=self._config.group_features,
            calibration=self._text.calibration,
        )
        with LoadView([self._label]) as view:
            return measure_sensitivities(job, partial(view.update, self._label))

    def mix(self) -> FormatMix | None:
        """The best within the budget, if there is one."""
        if self._config.budget is None:
            return None
        return mix_for_bits(self._given or self.measure(), self._config.budget)

    def write(self, mix: FormatMix | None) -> QuantizeResult:
        """The checkpoint."""
        config = self._config
        group_size = config.group_features
        if group_size is None and self._given is not None:
            group_size = self._given.group_size
        job = QuantizeJob(
            source=str(self._model),
            target=config.out,
            format=config.uniform_format if mix is None else None,
            mix=mix,
            group_size=group_size,
            method=self._method,
            calibration=self._text.calibration,
        )
        with LoadView([self._label]) as view:
            return quantize_checkpoint(job, partial(view.update, self._label))


def _group_name(size: int | None) -> str:
    return {None: AUTO, 0: "channel"}.get(size, str(size))


def _counts(mix: FormatMix) -> dict[str, int]:
    """Units of each format."""
    counts = Counter(fmt for layer in mix for fmt in layer.values())
    return {str(fmt): counts[fmt] for fmt in MIX_FORMATS if counts[fmt]}


def _summary(config: QuantizeConfig, result: QuantizeResult, mix: FormatMix | None) -> str:
    resumed = f", {result.resumed_files} files were there" if result.resumed_files else ""
    formats, held = config.uniform_format, ""
    if mix is not None:
        formats = " + ".join(f"{count} {fmt}" for fmt, count in _counts(mix).items())
        held = f"{result.held_bits_per_weight:.3f} bits per weight when held, "
    return (
        f"{config.out}: {result.num_layers} layers in {formats}, {held}"
        f"{result.bits_per_weight:.2f} bits per weight, {format_bytes(result.written_bytes)} "
        f"(from {format_bytes(result.source_bytes)}) in {format_seconds(result.elapsed_s)}{resumed}"
    )


def _totals(measured: Sensitivities) -> dict[str, float]:
    """Of all units together, in each format: the divergence if they add up."""
    return {
        str(fmt): sum(unit.formats[fmt].divergence for unit in measured.units)
        for fmt in MIX_FORMATS
    }


def _measured_json(config: QuantizeConfig, measured: Sensitivities) -> str:
    summary = {
        "path": str(Path(config.out) / FILE_NAME),
        "num_units": len(measured.units),
        "num_tokens": measured.num_tokens,
        "base_loss": measured.base_loss,
        "divergence": _totals(measured),
    }
    return json.dumps(summary, indent=2)


def _measured_summary(config: QuantizeConfig, measured: Sensitivities) -> str:
    totals = ", ".join(f"{fmt} {total:.4f}" for fmt, total in _totals(measured).items())
    worst = MIX_FORMATS[0]
    units = sorted(measured.units, key=lambda unit: -unit.formats[worst].divergence)
    named = ", ".join(
        f"layer {unit.layer} {unit.role} {unit.formats[worst].divergence:.4f}"
        for unit in units[:MOST_SENSITIVE]
    )
    return (
        f"{Path(config.out) / FILE_NAME}: {len(measured.units)} units, on {measured.num_tokens} "
        f"tokens, loss {measured.base_loss:.4f}. Divergence of all units together, in nats: "
        f"{totals}. Most sensitive to {worst}: {named}"
    )

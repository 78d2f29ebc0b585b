"""The command `tightfit quantize`: shows how far it has come, and what was written."""

from __future__ import annotations

import dataclasses
import json
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from tightfit.cluster.config import QuantizeConfig
from tightfit.cluster.hub import resolve_model
from tightfit.cluster.units import format_bytes, format_seconds
from tightfit.workers.api import LoadProgress
from tightfit.workers.quantizer import QuantizeJob, QuantizeResult, quantize_checkpoint

PLAIN_INTERVAL_S = 3.0


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
    with _View(Console(stderr=True)) as view:
        result = quantize_checkpoint(job, view.update)
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


class _View:
    """A bar on a terminal, else a line now and then; on stderr."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._printed_s = -PLAIN_INTERVAL_S

    def __enter__(self) -> _View:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, progress: LoadProgress) -> None:
        """Show how far it has come."""
        if self._console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=progress.bytes_total)
            self._bar.update(
                self._task, completed=progress.bytes_done, description=progress.message
            )
        elif time.monotonic() - self._printed_s >= PLAIN_INTERVAL_S:
            self._printed_s = time.monotonic()
            self._console.print(_line(progress), highlight=False, soft_wrap=True)


def _line(progress: LoadProgress) -> str:
    done, total = format_bytes(progress.bytes_done), format_bytes(progress.bytes_total)
    left = progress.seconds_left
    rest = f", {format_seconds(left)} left" if left is not None else ""
    return f"{progress.message}: {done} of {total}{rest}"

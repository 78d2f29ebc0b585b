"""What a mix of formats is worth, beside the uniform formats interpolated at the same bits.

`python bench/mixes.py [--only METHOD …] [--work DIR]`, a part of `make quality`. SmolLM2-135M and
the text of `quality.py`; two threads, half an hour or so for each method. Writes docs/mixes.json,
and docs/mixes.md from it. With `--only`, the other methods stay as they were measured before. With
`--work`, what was measured and written lies in that directory, and a run goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness
import quality
import torch

from tightfit.cluster.calibration_text import spread
from tightfit.cluster.planning.mix import mix_for_bits
from tightfit.workers.calibration import Calibration
from tightfit.workers.measuring import MeasureJob, measure_sensitivities
from tightfit.workers.quantizer import QuantizeJob, quantize_checkpoint
from tightfit.workers.sensitivity import MIX_FORMATS, FormatMix, Sensitivities

DOCS = Path(__file__).resolve().parent.parent / "docs"
REPORT, MEASURES = DOCS / "mixes.md", DOCS / "mixes.json"
METHODS = ("hqq", "gptq")
UNIFORM = ("int3", "int4")
BUDGETS = (3.6, 4.0)
MEASURE_WINDOWS = 2
"""Of `quality.CHOICE_TOKENS` tokens."""
MEASURE_SAMPLES, WRITE_SAMPLES = 8, 16
"""Of `quality.WINDOW` tokens, for gptq: while measuring, and for what is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One checkpoint."""

    name: str
    bits: float
    """For each weight, as held."""
    perplexity: float
    units: dict[str, int]
    """Number of units in each format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One method."""

    uniform: list[Row]
    """In the order of `UNIFORM`."""
    mixes: list[Row]
    """In the order of `BUDGETS`."""

    def interpolated(self, bits: float) -> float:
        """Perplexity on the line between the losses of the uniform formats: below the line between
        their perplexities."""
        low, high = self.uniform
        share = (bits - low.bits) / (high.bits - low.bits)
        logs = [math.log(row.perplexity) for row in self.uniform]
        return math.exp(logs[0] + share * (logs[1] - logs[0]))


class _Method:
    """One method's checkpoints, in a directory."""

    def __init__(self, method: str, text: quality.Text, work: Path) -> None:
        self._method, self._text, self._work = method, text, work / method
        # What is measured on is in no sample.
        self._pool = text.pool[:-MEASURE_WINDOWS]

    def _calibration(self, count: int) -> Calibration | None:
        if self._method != "gptq":
            return None
        return Calibration(samples=spread(self._pool, count))

    def result(self) -> Result:
        """Everything measured."""
        uniform = [self._row(f"`{fmt}`", fmt, fmt=fmt) for fmt in UNIFORM]
        measured = self._measure()
        mixes = [
            self._row(f"mix at {bits} bits", str(bits), mix=mix_for_bits(measured, bits))
            for bits in BUDGETS
        ]
        return Result(uniform=uniform, mixes=mixes)

    def _measure(self) -> Sensitivities:
        job = MeasureJob(
            source=str(harness.gguf()),
            target=str(self._work),
            windows=self._text.small_pool[-MEASURE_WINDOWS:],
            method=self._method,
            calibration=self._calibration(MEASURE_SAMPLES),
        )
        return measure_sensitivities(job)

    def _row(
        self, name: str, folder: str, *, fmt: str | None = None, mix: FormatMix | None = None
    ) -> Row:
        job = QuantizeJob(
            source=str(harness.gguf()),
            target=str(self._work / folder),
            format=fmt,
            mix=mix,
            method=self._method,
            calibration=self._calibration(WRITE_SAMPLES),
        )
        written = quantize_checkpoint(job)
        perplexity = quality.perplexity(Path(job.target), self._text)
        print(f"{self._method}, {name}: {perplexity:.2f}", file=sys.stderr, flush=True)
        counts = Counter(str(fmt) for layer in mix or () for fmt in layer.values())
        return Row(
            name=name,
            bits=written.held_bits_per_weight,
            perplexity=perplexity,
            units={str(fmt): counts[fmt] for fmt in MIX_FORMATS},
        )


def table(result: Result) -> str:
    """Uniform formats, mixes, and what they are held against."""
    lines = [
        "| format | bits per weight | perplexity | interpolated | units in int3 / int4 / int8 |",
        "|---|---:|---:|---:|---:|",
    ]
    lines += [f"| {r.name} | {r.bits:.2f} | {r.perplexity:.2f} | | |" for r in result.uniform]
    for row in result.mixes:
        units = " / ".join(str(row.units[fmt]) for fmt in MIX_FORMATS)
        lines.append(
            f"| {row.name} | {row.bits:.2f} | {row.perplexity:.2f} | "
            f"{result.interpolated(row.bits):.2f} | {units} |"
        )
    return "\n".join(lines)


def document(results: dict[str, Result]) -> str:
    """docs/mixes.md."""
    parts = "\n\n".join(f"## By {method}\n\n{table(result)}" for method, result in results.items())
    return f"""# Mixes of formats

Written by `python bench/mixes.py`, a part of `make quality`; do not edit.

SmolLM2-135M-Instruct and the held-out text of [quality.md](quality.md). Bits per weight are those
of the blocks' linear layers as a stage holds them, scales and zero points included; this model's
groups are of 64 (with groups of 128 `int3` has 3.25 and `int4` 4.25). A mix has one format for each
unit: the linear layers of one role (QKV, attention's output, up, down) in one of the 30 blocks.
Sensitivities were measured on {MEASURE_WINDOWS * quality.CHOICE_TOKENS} tokens of the text for
calibration, which gptq did not see; gptq had {MEASURE_SAMPLES} samples of {quality.WINDOW} tokens
for them and {WRITE_SAMPLES} for what was written (fewer than in quality.md, so that its numbers are
a little worse). "Interpolated" is the perplexity where a line from `int3` to `int4` has the mix's
bits, drawn through their losses (logarithms of perplexity): it is below the line through the
perplexities themselves.

{parts}
"""


def read_measures() -> dict[str, Result]:
    """What was measured before."""
    if not MEASURES.exists():
        return {}
    saved = json.loads(MEASURES.read_text())
    return {
        method: Result(**{part: [Row(**row) for row in rows] for part, rows in result.items()})
        for method, result in saved.items()
    }


def main() -> None:
    """Measure every method, or some."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--work", type=Path, help="default: a directory that is removed at the end")
    parser.add_argument("--threads", type=int, default=harness.THREADS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results, text = read_measures(), quality.texts()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        for method in args.only:
            results[method] = _Method(method, text, work).result()
            plain = {name: dataclasses.asdict(result) for name, result in results.items()}
            MEASURES.write_text(json.dumps(plain, indent=1) + "\n")
            REPORT.write_text(
                document({name: results[name] for name in METHODS if name in results})
            )


if __name__ == "__main__":
    main()

"""Compiles every Triton kernel ahead of time, without a GPU, and reads the machine code.

`python tools/kernel_report.py` prints what was found as JSON; with `--write` it is put into
docs/kernels.md, with the least time that memory allows for the layers of real models.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from tightfit.kernels import (
    activation,
    kv_write,
    llm_int8,
    norm,
    paged_attention,
    paged_prefill,
    sampling,
    w8a16,
    wxa16,
)
from tightfit.kernels.compiled import Compiled, compile_all
from tightfit.kernels.formats import Format, linear_bytes

MODULES = (
    w8a16, wxa16, llm_int8, norm, activation, sampling, kv_write, paged_attention, paged_prefill,
)  # fmt: skip
DOCUMENT = Path(__file__).parent.parent / "docs" / "kernels.md"
MARK = "<!-- below: written by make kernels -->"
BANDWIDTHS = {"A100 80 GB": 2.04, "H100": 3.35, "L40S": 0.864, "L4": 0.3, "V100": 0.9}
"""TB/s, by the vendor's data sheets."""
SHAPES = {
    "BLOOM-176B": ((43_008, 14_336), (14_336, 14_336), (57_344, 14_336), (14_336, 57_344)),
    "OPT-175B": ((36_864, 12_288), (12_288, 12_288), (49_152, 12_288), (12_288, 49_152)),
}
"""(N, K) of a block's linear layers."""
NAMES = ("qkv", "attn_out", "mlp_up", "mlp_down")
FORMATS = (Format.INT8, Format.INT4, Format.INT3)


def report() -> list[Compiled]:
    """Every case of every kernel on every capability that it is for."""
    jobs = [
        (module, index, capability)
        for module in range(len(MODULES))
        for index, case in enumerate(MODULES[module].compile_cases())
        for capability in case.capabilities
    ]
    by_capability = defaultdict(list)
    for job in jobs:
        by_capability[job[2]].append(job)
    parts = [
        same[start : start + BATCH]
        for same in by_capability.values()
        for start in range(0, len(same), BATCH)
    ]
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        done = pool.map(_compile, parts, chunksize=1)
    found = {
        job: one
        for part, several in zip(parts, done, strict=True)
        for job, one in zip(part, several, strict=True)
    }
    return [found[job] for job in jobs]


BATCH = 16
"""Cases whose code is disassembled at once."""


def _compile(jobs: Sequence[tuple[int, int, int]]) -> list[Compiled]:
    cases = [MODULES[module].compile_cases()[index] for module, index, _ in jobs]
    return compile_all(cases, jobs[0][2])


def document(found: Sequence[Compiled]) -> str:
    """The tables of docs/kernels.md."""
    lines = ["## What the machine code says", ""]
    lines += ["Of each column the least and the most over the chips; widest load, in bytes.", ""]
    lines += ["| kernel | chips | registers | shared KiB | tensor-core ops | widest load |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    by_name = defaultdict(list)
    for one in found:
        by_name[one.name].append(one)
    for name, several in by_name.items():
        columns = (
            _range(one.registers for one in several),
            _range(round(one.shared_bytes / 1024) for one in several),
            _range(one.num_tensor_ops for one in several),
            _range(one.widest_load_bytes for one in several),
        )
        chips = _range(one.capability for one in several)
        lines.append(f"| {name} | {chips} | {' | '.join(columns)} |")
    return "\n".join([*lines, "", *_bounds()]) + "\n"


def _range(numbers: Iterable[int]) -> str:
    sorted_numbers = sorted(numbers)
    least, most = sorted_numbers[0], sorted_numbers[-1]
    return str(least) if least == most else f"{least} to {most}"


def _bounds() -> list[str]:
    lines = ["## The least time of one token", ""]
    lines += ["Milliseconds to read a layer's weight once, at the bandwidth of the data sheet.", ""]
    lines += ["| model | layer | N × K | format | MB | " + " | ".join(BANDWIDTHS) + " |"]
    lines += ["|---|---|---|---|---:|" + "---:|" * len(BANDWIDTHS)]
    for model, shapes in SHAPES.items():
        for name, (n_out, n_in) in zip(NAMES, shapes, strict=True):
            for fmt in FORMATS:
                size = linear_bytes(fmt, n_out, n_in)
                times = (f"{size / bandwidth / 1e9:.3f}" for bandwidth in BANDWIDTHS.values())
                lines.append(
                    f"| {model} | {name} | {n_out:,} × {n_in:,} | {fmt} | {size / 1e6:.0f} | "
                    + " | ".join(times)
                    + " |"
                )
    return lines


def main() -> int:
    """Print or write the report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/kernels.md")
    args = parser.parse_args()
    found = report()
    if args.write:
        head, _, _ = DOCUMENT.read_text().partition(MARK)
        DOCUMENT.write_text(f"{head}{MARK}\n\n{document(found)}")
    else:
        json.dump([dataclasses.asdict(one) for one in found], sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())

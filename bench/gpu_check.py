"""Checks and times every GPU kernel on this machine, into docs/gpu-results.json and docs/gpu.md.

`make gpu-check`, or `python bench/gpu_check.py [--seconds 540] [--quick] [--out DIRECTORY]`. Wants
torch with CUDA, Triton and pytest. Results are written after each part, so that a run that is
stopped leaves what it has, and parts for which no time is left are named as left out. The last that
is printed is a summary; the exit code is 1 when a check failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/gpu",
    *(
        f"tests/kernels/test_{name}.py"
        for name in (
            "paged_attention", "kv_write", "wxa16", "w8a16", "llm_int8", "sampling", "norm",
            "activation",
        )
    ),
)  # fmt: skip
LARGEST_ERROR = {"int8": 0.01, "int4": 0.01, "int3": 0.01, "llm_int8": 0.03}
"""‖error‖ / ‖y‖ with bf16 activations; LLM.int8() rounds activations to 8 bits besides."""
MODEL_LAYERS = {"BLOOM-176B": 70}


class Check:
    """The parts that ran, and their results."""

    def __init__(self, seconds: float, out: Path) -> None:
        self._deadline, self._out = time.monotonic() + seconds, out
        self._started = time.monotonic()
        self.results: dict[str, Any] = {}
        self.failures: list[str] = []
        self.left_out: list[str] = []

    def seconds_left(self) -> float:
        """Until results have to be there."""
        return self._deadline - time.monotonic()

    def part(self, name: str, needed_s: float, run: Callable[[], Any]) -> None:
        """Run a part if there is time for it; an error in it ends that part only."""
        if self.seconds_left() < needed_s:
            self.left_out.append(name)
            return
        started = time.monotonic()
        print(f"{name} …", flush=True)
        try:
            self.results[name] = _plain(run())
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{name}: {error!r}"[:300])
        print(f"{name}: {time.monotonic() - started:.1f} s", flush=True)
        self.write()

    def write(self) -> None:
        """Both files, as far as they go."""
        done = {
            **self.results, "failures": self.failures, "left_out": self.left_out,
            "seconds": round(time.monotonic() - self._started, 1),
        }  # fmt: skip
        (self._out / "gpu-results.json").write_text(json.dumps(done, indent=1) + "\n")
        (self._out / "gpu.md").write_text(document(done))


def _plain(value: Any) -> Any:
    """JSON of dataclasses, lists and generators of them."""
    if is_dataclass(value) and not isinstance(value, type):
        return {k: v for k, v in asdict(value).items() if v is not None}
    if isinstance(value, dict):
        return value
    return [_plain(one) for one in value] if isinstance(value, Iterable) else value


def device() -> dict[str, Any]:
    """What this was run on."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def run_tests(limit_s: float) -> dict[str, Any]:
    """The kernels' tests, which compare each with its reference, and those of shards on a GPU.

    Raises:
        RuntimeError: some failed, or the time was not enough.
    """
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--maxfail=20",
        "-p", "no:cacheprovider", "-p", "no:benchmark", *TESTS,
    ]  # fmt: skip
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(min(16, os.cpu_count() or 1))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # the processes share the cores
        )  # fmt: skip
        said = done.stdout
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        said = out.decode(errors="replace") if isinstance(out, bytes) else out
        print(said[-3000:])
        raise RuntimeError(f"the tests did not end within {limit_s:.0f} s") from error
    print(said[-6000:] if done.returncode else said[-300:])
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said)}
    if done.returncode:
        names = re.findall(r"^FAILED (\S+)", said, re.MULTILINE)
        raise RuntimeError(f"{counts}; failed: {', '.join(names[:8])}")
    return counts


def timings(*, quick: bool) -> list[Any]:
    """Every kernel at real sizes."""
    import gpu_timing as timing

    tokens = (1, 64) if quick else (1, 4, 16, 64, 512)
    formats = ("int8", "int4", "int3", "llm_int8")
    found = [
        *timing.linears(
            "BLOOM-176B", ("mlp_up",) if quick else tuple(timing.LAYERS["BLOOM-176B"]), tokens,
            formats,
        )
    ]  # fmt: skip
    if not quick:
        found += timing.linears("OPT-175B", ("qkv", "mlp_down"), tokens, formats)
    for model in ("BLOOM-176B",) if quick else tuple(timing.HEADS):
        for batch in (1, 8):
            for is_int8 in (False, True):
                found.append(timing.attention(model, batch, 2048, is_int8=is_int8))
        found.append(timing.chunk_attention(model, 512, 2048))
    for count in (1, 16, 512):
        found += timing.others(count)
    return found


def check_errors(found: list[dict[str, Any]]) -> list[str]:
    """Of the timed products, those that were wrong."""
    return [
        f"{one['kernel']} {one['shape']} T={one['tokens']}: error {one['error']:.1e}"
        for one in found
        if "error" in one and not one["error"] <= LARGEST_ERROR[one["kernel"]]
    ]


def blocks(check: Check, *, quick: bool) -> list[Any]:
    """Full-width blocks through two stages."""
    import gpu_blocks

    cases = [("int4", "auto", 1), ("int8", "auto", 1), ("int4", "int8", 8), ("int3", "auto", 1)]
    found = []
    for layers in gpu_blocks.DEPTHS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bloom"
            gpu_blocks.save(path, layers)
            for fmt, kv_format, count in cases[:1] if quick else cases:
                if found and check.seconds_left() < 25:
                    check.left_out.append(f"{layers} blocks in {fmt}")
                    continue
                found.append(gpu_blocks.run(path, layers, fmt, kv_format, count))
    for one in found:
        if not one.held_bytes <= one.measured_bytes <= one.held_bytes + one.workspace_bytes:
            check.failures.append(
                f"blocks in {one.format}: {one.measured_bytes:,} bytes measured, "
                f"{one.held_bytes:,} predicted and {one.workspace_bytes:,} for workspace"
            )
    return found


def document(done: dict[str, Any]) -> str:
    """docs/gpu.md."""
    lines = ["# On a GPU", ""]
    gpu = done.get("device")
    if gpu is None:
        return "\n".join([*lines, "Nothing ran.", ""])
    lines += [
        f"`make gpu-check` on one {gpu['name']} (capability {gpu['capability']}, "
        f"{gpu['memory_gib']} GiB), torch {gpu['torch']}, Triton {gpu['triton']}, in "
        f"{done['seconds']:.0f} s. Written by `bench/gpu_check.py`; the numbers themselves are in "
        "[gpu-results.json](gpu-results.json).",
        "",
    ]
    if "ceilings" in done:
        lines += [
            f"Copying reaches {done['ceilings']['copy_gb_per_s']:,.0f} GB/s (bytes read and "
            f"written), cuBLAS {done['ceilings']['bf16_tflop_per_s']:,.0f} TFLOP/s in bf16.",
            "",
        ]
    if "tests" in done:
        lines += [f"Tests of the kernels and of shards: {_counts(done['tests'])}.", ""]
    for title, names in (("Failed", "failures"), ("Left out, for time", "left_out")):
        if done[names]:
            lines += [f"{title}: {'; '.join(done[names])}.", ""]
    if "note" in done:
        lines += [done["note"], ""]
    lines += _timing_tables(done.get("timings", [])) + _block_table(done.get("blocks", []))
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {word}" for word, n in counts.items())


def _timing_tables(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = ["## Linear layers", "", "Microseconds; × is the speed over cuBLAS with bf16 weights, "]
    lines[-1] += "GB/s what was read of the weight."
    lines += ["", "| layer | tokens | cuBLAS | int8 | int4 | int3 | llm_int8 |"]
    lines += ["|---|---:|---:|---:|---:|---:|---:|"]
    rows: dict[tuple[str, int], dict[str, str]] = {}
    rest = []
    for one in found:
        if one["kernel"] in ("cuBLAS bf16", *LARGEST_ERROR):
            text = f"{one['us']:,.0f}"
            if "speedup" in one:
                text += f" ({one['speedup']:.2f} ×, {one['gb_per_s']:,.0f} GB/s)"
            rows.setdefault((one["shape"], one["tokens"]), {})[one["kernel"]] = text
        else:
            rest.append(one)
    for (shape, tokens), cells in rows.items():
        columns = (cells.get(name, "") for name in ("cuBLAS bf16", *LARGEST_ERROR))
        lines.append(f"| {shape} | {tokens} | {' | '.join(columns)} |")
    lines += ["", "## The other kernels", "", "| kernel | size | tokens | µs | GB/s |"]
    lines += ["|---|---|---:|---:|---:|"]
    for one in rest:
        speed = f"{one['gb_per_s']:,.0f}" if "gb_per_s" in one else ""
        lines.append(
            f"| {one['kernel']} | {one['shape']} | {one['tokens']} | {one['us']:,.1f} | {speed} |"
        )
    return [*lines, ""]


def _block_table(found: list[dict[str, Any]]) -> list[str]:
    if not found:
        return []
    lines = [
        "## Full-width blocks through two stages",
        "",
        "Blocks of BLOOM-176B's width, half of them on each of two stages on this GPU, hidden "
        "states between them as bytes through the host; context 512 and more. A stage's layers "
        "name one stored block, which it reads once for each. Bytes: weights and KV cache as "
        "predicted, and what the allocator had given out when both stages had loaded, graphs "
        "included.",
        "",
        "| layers | format | KV | sequences | prefill of 512, ms | decode step, ms | bytes "
        "predicted | measured |",
        "|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        prefill = f"{one['prefill_ms']:.1f}" if "prefill_ms" in one else ""
        lines.append(
            f"| {one['layers']} | {one['format']} | {one['kv_format']} | {one['num_sequences']} | "
            f"{prefill} | {one['decode_ms']:.2f} | {one['held_bytes']:,} | "
            f"{one['measured_bytes']:,} |"
        )
    depths = [
        (name, _layer_ms(several), several)
        for name, several in _by_case(found).items()
        if len(several) > 1
    ]
    if not depths:
        return [*lines, ""]
    depth = MODEL_LAYERS["BLOOM-176B"]
    lines += [
        "",
        f"From both depths, a layer's time; and, **not measured but computed**, a step of {depth} "
        "layers on two stages, with the small head of this model.",
        "",
        f"| format | sequences | one layer, ms | {depth} layers, ms |",
        "|---|---:|---:|---:|",
    ]
    for (fmt, _, sequences), layer_ms, several in depths:
        whole = several[0]["decode_ms"] + (depth - several[0]["layers"]) * layer_ms
        lines.append(f"| {fmt} | {sequences} | {layer_ms:.3f} | {whole:.1f} |")
    return [*lines, ""]


def _by_case(found: list[dict[str, Any]]) -> dict[tuple[str, str, int], list[dict[str, Any]]]:
    cases: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for one in found:
        key = (one["format"], one["kv_format"], one["num_sequences"])
        cases.setdefault(key, []).append(one)
    return cases


def _layer_ms(several: list[dict[str, Any]]) -> float:
    first, last = several[0], several[-1]
    return float((last["decode_ms"] - first["decode_ms"]) / (last["layers"] - first["layers"]))


def summary(check: Check) -> str:
    """The last that is printed."""
    results = check.results
    lines = ["", "== gpu-check =="]
    lines.append(str(results.get("device", "no device")))
    lines.append(str(results.get("ceilings", "")))
    lines.append(f"tests: {results.get('tests', 'not passed')}")
    for one in results.get("timings", []):
        if one["tokens"] in (1, 8) and ("mlp_up" in one["shape"] or "attention" in one["kernel"]):
            lines.append(
                f"{one['kernel']:22} {one['shape']:34} T={one['tokens']:<3} {one['us']:9.1f} µs "
                f"{one.get('gb_per_s', 0):7.0f} GB/s {one.get('speedup', 0):5.2f} ×"
            )
    for one in results.get("blocks", []):
        lines.append(
            f"{one['layers']} blocks in {one['format']}, KV {one['kv_format']} × "
            f"{one['num_sequences']}: {one['decode_ms']:.2f} ms a step, prefill "
            f"{one['prefill_ms']:.0f} ms"
        )
    lines += [f"FAILED {failure}" for failure in check.failures]
    lines += [f"left out: {name}" for name in check.left_out]
    lines.append("ok" if not check.failures else f"{len(check.failures)} failed")
    return "\n".join(lines)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="after which it is done")
    parser.add_argument("--quick", action="store_true", help="few sizes, no tests")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="where results go")
    args = parser.parse_args()
    missing = [name for name in ("torch", "triton", "pytest") if not importlib.util.find_spec(name)]
    if missing:
        print(f"gpu-check wants {', '.join(missing)} in {sys.executable}", file=sys.stderr)
        return 2
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} of {sys.executable} sees no CUDA GPU", file=sys.stderr)
        return 2
    import gpu_timing

    check = Check(args.seconds, args.out)
    check.part("device", 0, device)
    check.part("ceilings", 5, gpu_timing.ceilings)
    check.part("timings", 30, lambda: timings(quick=args.quick))
    check.failures += check_errors(check.results.get("timings", []))
    check.part("blocks", 40, lambda: blocks(check, quick=args.quick))
    if not args.quick:
        limit = check.seconds_left() - 5
        check.part("tests", 30, lambda: run_tests(limit))
    check.write()
    print(summary(check))
    return 1 if check.failures else 0


if __name__ == "__main__":
    sys.exit(main())

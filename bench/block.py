"""One BLOOM-176B block and one token on this CPU: its linear layers beside a read of their bytes.

`python bench/block.py [--rounds 15] [--threads N]`. One token is bound by reading weights: no
kernel can take less than a plain read of them does. Random integers; the sides take turns, so that
both meet the same disturbances. Wants 8 GB of memory; prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness
import torch
import wide_models
from torch import Tensor

from tightfit.kernels.dispatch import Linear, hold_linear
from tightfit.kernels.formats import Format
from tightfit.kernels.groups import INT8_MIDDLE, Quantized
from tightfit.workers.decoder_config import decoder_config

TARGETS = {Format.INT8: 1.2, Format.INT4: 1.8}
"""Time of the linear layers over that of the read, at most."""
GROUP, BITS = 128, {Format.INT8: 8, Format.INT4: 4}
WARM_UPS = 2


def layer(fmt: Format, n_out: int, n_in: int) -> Linear:
    """A linear layer [n_out, n_in] of random integers, with a bias."""
    bits, groups = BITS[fmt], 1 if fmt is Format.INT8 else n_in // GROUP
    integers = torch.empty(n_out, n_in, dtype=torch.uint8).random_(0, 2**bits)
    middle = INT8_MIDDLE if fmt is Format.INT8 else 2 ** (bits - 1)
    weight = Quantized(
        bits=bits,
        integers=integers,
        scale=torch.full((n_out, groups), 1e-3),
        zero_point=torch.full((n_out, groups), middle),
    )
    return hold_linear(weight, torch.zeros(n_out), fmt)


READERS: dict[str, Callable[[Tensor], object]] = {
    "sum of int64": lambda words: words.view(torch.int64).sum(),
    "sum of fp32": lambda words: words.view(torch.float32).sum(),
    "greatest int32": lambda words: words.view(torch.int32).amax(),
}
"""Ways to read bytes once with torch; the fastest on this machine is what the layers meet."""


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure(fmt: Format, *, rounds: int) -> dict[str, Any]:
    """Medians of both sides, and of the rounds' ratios."""
    config = decoder_config(wide_models.BLOOM_176B)
    linears = [layer(fmt, linear.n_out, linear.n_in) for linear in config.layer_linears(0)]
    inputs = [torch.randn(1, linear.n_in).to(torch.bfloat16) for linear in linears]
    # As many bytes as the layer reads: a packed weight is no tensor that could be read itself.
    words = [torch.ones(one.weight.nbytes // 8 * 8, dtype=torch.uint8) for one in linears]

    def compute() -> None:
        for linear, x in zip(linears, inputs, strict=True):
            linear(x)

    def read(reader: Callable[[Tensor], object]) -> None:
        for some in words:
            reader(some)

    trials = {
        name: min(timed(lambda reader=reader: read(reader)) for _ in range(WARM_UPS + 1))
        for name, reader in READERS.items()
    }
    fastest = min(trials, key=lambda name: trials[name])
    for _ in range(WARM_UPS):
        compute()
    pairs = [(timed(compute), timed(lambda: read(READERS[fastest]))) for _ in range(rounds)]
    ratio = statistics.median(computed / plain for computed, plain in pairs)
    num_bytes = sum(some.nbytes for some in words)
    read_s = statistics.median(plain for _, plain in pairs)
    return {
        "bytes": num_bytes,
        "linears_ms": statistics.median(computed for computed, _ in pairs) * 1e3,
        "read_ms": read_s * 1e3,
        "read_gb_per_s": num_bytes / read_s / 1e9,
        "reader": fastest,
        "ratio": ratio,
        "target": TARGETS[fmt],
        "is_met": ratio <= TARGETS[fmt],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    figures: dict[str, Any] = {
        "machine": harness.machine(),
        "load_average": harness.load_average(),
        "threads": args.threads,
        "rounds": args.rounds,
    }
    with torch.inference_mode():
        for fmt in TARGETS:
            figures[str(fmt)] = measure(fmt, rounds=args.rounds)
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

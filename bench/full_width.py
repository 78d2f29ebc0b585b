"""BLOOM-176B and OPT-175B in full width and depth on this machine, into docs/full-width.md.

`make full-width`, or `python bench/full_width.py [--shapes bloom-176b …] [--work DIRECTORY]`.
All layers of such a checkpoint name one stored block of random weights: the arithmetic of a
token is the real one, and the weights are read from memory 70 or 96 times. The block is quantised
by `tightfit quantize`, the model is served by three stages, and answers over gRPC. Wants 12 GB of
disk in DIRECTORY and as much memory; ten minutes or more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness
import torch
import wide_models

from tightfit.client import Client
from tightfit.workers.checkpoint import find_prefix, open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.embedding import EmbeddingTable
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard_bytes import model_bytes

PAGE = Path(__file__).resolve().parent.parent / "docs" / "full-width.md"
SHAPES = {"bloom-176b": wide_models.BLOOM_176B, "opt-175b": wide_models.OPT_175B}
NAMES = {"bloom-176b": "BLOOM-176B", "opt-175b": "OPT-175B"}
STAGES, PROMPT, NEW_TOKENS = 3, (11, 4096, 29, 31337), 4
SOURCE_VOCAB = 1024
"""Tokens of what is quantised: the embedding is copied as it is, and is made in full size later."""
FLAGS = (
    "--stages", str(STAGES), "--threads-per-stage", str(os.cpu_count() or 1),
    "--embedding-place", "host", "--head-format", "int8", "--kv-blocks", "4", "--max-context", "64",
    "--max-batch-tokens", "16",
)  # fmt: skip
SPIN_COUNT = "1000"
"""GOMP_SPINCOUNT of the stages. All have threads for all cores, as one computes at a time: threads
that wait give their core away soon, and beside a layer's milliseconds a wake-up is nothing."""
START_LIMIT_S, ANSWER_LIMIT_S = 1800.0, 1200.0
LOOKUPS, SMOLLM2 = 200, "smollm2-135m"


@contextmanager
def timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    """Note how long the block takes, in seconds."""
    print(f"{name} …", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    figures[f"{name}_s"] = time.monotonic() - started


def build(shape: str, work: Path, figures: dict[str, Any]) -> Path:
    """The full checkpoint in int4; what it is made from is removed on the way."""
    config = SHAPES[shape]
    small = wide_models.resized(config, layers=1, vocab_size=SOURCE_VOCAB)
    with timed(figures, "random_block"):
        wide_models.save_source(work / "source", small)
    with timed(figures, "quantize"):
        said, peak = wide_models.quantize(work / "source", work / "int4", "--format", "int4")
    figures |= {"bits_per_weight": said["bits_per_weight"], "quantize_peak_bytes": peak}
    shutil.rmtree(work / "source")
    with timed(figures, "repeat"):
        wide_models.save_repeated(work / shape, work / "int4", config)
    shutil.rmtree(work / "int4")
    return work / shape


def lookups(model: Path) -> dict[str, Any]:
    """What a look-up in a mapped embedding takes: milliseconds, and anonymous bytes of them all."""
    checkpoint = open_checkpoint(model)
    config = decoder_config(checkpoint.config)
    name = f"{find_prefix(checkpoint, config, model)}{config.names.embedding}.weight"
    tensor = checkpoint.read(name)
    checkpoint.close()
    before = wide_models.anonymous_bytes(os.getpid())
    table = EmbeddingTable(tensor, dtype=torch.bfloat16, device="cpu")
    ids = torch.randint(config.vocab_size, (LOOKUPS, 1), generator=torch.Generator().manual_seed(0))
    first, again = ([_lookup_ms(table, one) for one in ids] for _ in range(2))
    return {
        "table_bytes": tensor.nbytes,
        "first_ms": statistics.median(first),
        "again_ms": statistics.median(again),
        "anonymous_bytes": max(0, wide_models.anonymous_bytes(os.getpid()) - before),
    }


def _lookup_ms(table: EmbeddingTable, token_ids: torch.Tensor) -> float:
    started = time.perf_counter()
    table(token_ids)
    return (time.perf_counter() - started) * 1e3


def answer(client: Client) -> tuple[list[int], list[float]]:
    """(new tokens, seconds to each since the one before)."""
    tokens, waits, last = [], [], time.monotonic()
    for chunk in client.stream(list(PROMPT), max_tokens=NEW_TOKENS, ignore_eos=True):
        if chunk.token_ids:
            tokens += chunk.token_ids
            waits.append(time.monotonic() - last)
            last = time.monotonic()
    return tokens, waits


def ask(model: Path, figures: dict[str, Any]) -> None:
    """Serve, ask twice, note times and memory.

    Raises:
        SystemExit: the answers differ, or hold what is no token of the model.
    """
    own = wide_models.anonymous_bytes(os.getpid())
    with (
        wide_models.PeakMemory(os.getpid()) as peak,
        timed(figures, "start_and_answer"),
        harness.Service(*FLAGS, model=model, start_limit_s=START_LIMIT_S) as service,
        Client(service.target, timeout_s=ANSWER_LIMIT_S) as client,
    ):
        figures["load_peak_bytes"] = peak.peak_bytes - own
        vocab = client.model().vocab_size
        with wide_models.PeakMemory(service.pid) as answering:
            (tokens, waits), (again, more) = answer(client), answer(client)
        stages = client.status().stages
    if tokens != again or len(tokens) != NEW_TOKENS or not all(0 <= t < vocab for t in tokens):
        raise SystemExit(f"{model.name}: {tokens} and {again} should be equal, of {vocab} tokens")
    figures |= {
        "tokens": tokens,
        "first_token_s": [waits[0], more[0]],
        "token_s": [*waits[1:], *more[1:]],
        "anonymous_bytes": answering.peak_bytes,
        "stages": [
            {
                "layers": [stage.first_layer, stage.end_layer],
                "predicted": stage.memory.predicted_weight_bytes,
                "weights": stage.memory.weight_bytes,
                "kv_cache": stage.memory.kv_cache_bytes,
                "rss_anon": stage.memory.rss_anon_bytes,
            }
            for stage in stages
        ],
    }


def measure(shape: str, work: Path) -> dict[str, Any]:
    """All figures of one shape."""
    figures: dict[str, Any] = {
        "machine": harness.machine(),
        "load_average": harness.load_average(),
    }
    model = build(shape, work, figures)
    figures["lookups"] = lookups(model)
    ask(model, figures)
    figures["load_average_after"] = harness.load_average()
    shutil.rmtree(model)
    return figures


def gb(num_bytes: float) -> str:
    """In 10⁹ bytes."""
    return f"{num_bytes / 1e9:.2f}"


def section(shape: str, figures: dict[str, Any]) -> str:
    """A shape's part of the page."""
    config = decoder_config(SHAPES[shape])
    weights = model_bytes(config, model_formats(config, "int4"))
    read, token_s = sum(weights.layers) + weights.head, statistics.median(figures["token_s"])
    lines = [
        f"## {NAMES[shape]}",
        "",
        f"{config.num_layers} layers of {config.hidden_size:,} features and {config.num_heads} "
        f"heads, {config.vocab_size:,} tokens. {figures['machine']}. Load average of the last "
        f"minute before {figures['load_average']}, after {figures['load_average_after']}: what "
        "other work there was beside it (0: none; after, the run itself counts 1 to 3).",
        "",
        f"- seconds per token: median **{token_s:.1f}** "
        f"({', '.join(f'{s:.1f}' for s in figures['token_s'])}), in which {gb(read)} GB of weights "
        f"are read: {gb(read / token_s)} GB/s; to the first token of a prompt of {len(PROMPT)}: "
        f"{', '.join(f'{s:.1f}' for s in figures['first_token_s'])}",
        f"- both answers: {figures['tokens']}",
        f"- `tightfit quantize` of one block: {figures['quantize_s']:.0f} s, "
        f"{figures['bits_per_weight']:.2f} bits per weight, at most "
        f"{gb(figures['quantize_peak_bytes'])} GB of anonymous memory (a block in fp32 is "
        f"{gb(4 * config.largest_layer_elements)} GB)",
        f"- all processes of the service: at most {gb(figures['load_peak_bytes'])} GB of anonymous "
        f"memory while loading, {gb(figures['anonymous_bytes'])} GB while answering",
        "",
        "| stage | layers | weights predicted, GB | measured, GB | KV cache, GB | added to its "
        "process, GB |",
        "|---|---|---|---|---|---|",
    ]
    for index, stage in enumerate(figures["stages"]):
        first, end = stage["layers"]
        lines.append(
            f"| {index} | {first}–{end - 1} | {gb(stage['predicted'])} | {gb(stage['weights'])} | "
            f"{gb(stage['kv_cache'])} | {gb(stage['rss_anon'])} |"
        )
    return "\n".join([*lines, ""])


def lookup_table(figures: dict[str, dict[str, Any]]) -> str:
    """Of every model whose embedding was looked up in its file."""
    lines = [
        "| embedding of | table, GB | look-up, first, ms | again, ms | anonymous memory, MB |",
        "|---|---|---|---|---|",
    ]
    for name, one in figures.items():
        lines.append(
            f"| {NAMES.get(name, 'SmolLM2-135M')} | {gb(one['table_bytes'])} | "
            f"{one['first_ms']:.3f} | {one['again_ms']:.3f} | {one['anonymous_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def page(figures: dict[str, dict[str, Any]]) -> str:
    """docs/full-width.md."""
    shapes = [shape for shape in SHAPES if shape in figures]
    tables = {name: one["lookups"] for name, one in figures.items() if "lookups" in one}
    sections = "\n".join(section(shape, figures[shape]) for shape in shapes)
    return f"""# Full width and full depth

Written by `make full-width` (`bench/full_width.py`); do not edit. The shapes of the 175B models
with random weights: all layers of a checkpoint name one stored block, which `tightfit quantize`
made int4 (rounded to nearest), so that each stage holds one block and reads it once for each of its
layers. What it says means nothing; the arithmetic, the widths, the depth and the bytes read for a
token are those of the model. Greedy, over gRPC, one stream, no end before the last token, each
prompt asked twice:

`tightfit serve … {" ".join(FLAGS)}`

{sections}
## Embedding look-up from the file

One random row of the mapped table at a time, converted to bf16; medians of {LOOKUPS}. The first
look-up of a row maps its pages, or reads them from disk if they are not in the page cache.

{lookup_table(tables)}
"""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--work", type=Path, help="directory for 12 GB; default: a temporary one")
    parser.add_argument("--output", type=Path, default=PAGE, help="Markdown file to write")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    figures = {SMOLLM2: {"lookups": lookups(harness.converted())}}
    for shape in args.shapes:
        with tempfile.TemporaryDirectory(prefix="tf-wide-", dir=args.work) as work:
            figures[shape] = measure(shape, Path(work))
        print(json.dumps({shape: figures[shape]}, indent=1))
    args.output.write_text(page(figures), encoding="utf-8")
    print(f"written: {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()

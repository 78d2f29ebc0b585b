"""What each format and each way of rounding costs, as perplexity on held-out text.

`make quality`, or `python bench/quality.py [--only [PART …]]`. SmolLM2-135M, CPU, two threads, most
of an hour. The text is Debian's `fortunes`, every tenth of them held out, the others for
calibration. Writes docs/quality.json, and docs/quality.md from it. With `--only`, the other parts
stay as they were measured before.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
import harness
import safetensors.torch
import torch

from tightfit.cluster.tokenizer import load_tokenizer
from tightfit.kernels.formats import OUTLIER_THRESHOLD
from tightfit.workers.api import MicroBatch, SequenceSlice, StageSpec
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.quantizer import (
    Calibration,
    QuantizeJob,
    pick_samples,
    quantize_checkpoint,
)
from tightfit.workers.shard import ShardModel

DOCS = Path(__file__).resolve().parent.parent / "docs"
REPORT, MEASURES = DOCS / "quality.md", DOCS / "quality.json"
FORTUNES = Path("/usr/share/games/fortunes")
HELD_OUT_EVERY = 10
BLOCK = 16
LOGIT_ROWS = 64
WINDOW = 512
WINDOWS = 48
SAMPLES = 128
CHOICE_SAMPLES, CHOICE_TOKENS = 8, 256
RANDOM_SEEDS = 3
PLANTED_COLUMNS, PLANTED_FACTOR = 6, 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table."""

    name: str
    perplexity: float
    bits: str = ""
    seconds: str = ""
    int8_kv: float | None = None
    """Perplexity with keys and values in int8, too; None in tables without it."""


@dataclass(slots=True, kw_only=True)
class Text:
    """Token ids, cut into windows."""

    held_out: list[list[int]]
    pool: list[list[int]] = field(default_factory=list)
    """Of `WINDOW` tokens each."""
    small_pool: list[list[int]] = field(default_factory=list)
    """Of `CHOICE_TOKENS` tokens each."""


def fortunes() -> list[str]:
    """All of them, in order; the package is fetched if it is not installed.

    Raises:
        SystemExit: it is not, and cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as work:
        root = FORTUNES
        if not root.is_dir():
            for command in (["apt-get", "download", "fortunes"], ["sh", "-c", "dpkg -x *.deb x"]):
                if subprocess.run(command, cwd=work, capture_output=True, check=False).returncode:
                    raise SystemExit("there are no fortunes: run `apt-get install fortunes`")
            root = Path(work) / "x" / FORTUNES.relative_to("/")
        files = sorted(file for file in root.iterdir() if not file.suffix and not file.is_symlink())
        return [
            entry for file in files for entry in file.read_text(errors="replace").split("\n%\n")
        ]


def texts() -> Text:
    """Shuffled, and cut."""
    entries = fortunes()
    held_out = entries[::HELD_OUT_EVERY]
    others = [entry for i, entry in enumerate(entries) if i % HELD_OUT_EVERY]
    for part in (held_out, others):
        random.Random(0).shuffle(part)
    tokenizer = load_tokenizer(harness.gguf())
    known, unknown = (tokenizer.encode("\n\n".join(part)) for part in (others, held_out))
    return Text(
        held_out=_windows(unknown, WINDOW)[:WINDOWS],
        pool=_windows(known, WINDOW),
        small_pool=_windows(known, CHOICE_TOKENS),
    )


def _windows(tokens: list[int], size: int) -> list[list[int]]:
    return [tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size)]


@torch.inference_mode()
def perplexity(
    path: Path,
    text: Text,
    fmt: str = "auto",
    *,
    kv: str = "auto",
    use_many: bool | None = None,
    threshold: float | None = None,
) -> float:
    """Of the held-out windows, each by itself, its keys and values written to the cache first and
    read from there; `use_many` overrules the measured crossover."""
    checkpoint = open_checkpoint(path)
    config = decoder_config(checkpoint.config)
    spec = StageSpec(
        model_path=str(path), stage_index=0, num_stages=1, first_layer=0,
        end_layer=config.num_layers, format=fmt, kv_format=kv, block_size=BLOCK,
        llm_int8_threshold=threshold,
    )  # fmt: skip
    shard = ShardModel.load(checkpoint, config, spec)
    checkpoint.close()
    if use_many is not None:
        for layer in shard.layers:
            for linear in (
                layer.weights.qkv, layer.weights.attn_out, layer.weights.mlp_up,
                layer.weights.mlp_down,
            ):  # fmt: skip
                linear.crossover = 0 if use_many else WINDOW + 1
    blocks = list(range(WINDOW // BLOCK))
    shard.allocate_kv(len(blocks))
    loss, count = 0.0, 0
    for window in text.held_out:
        part = SequenceSlice(sequence_id=0, start_position=0, token_ids=window, block_table=blocks)
        hidden = shard.forward(MicroBatch(epoch=0, step=0, slices=[part]), None)
        rows = [shard.logits(some) for some in hidden[:-1].split(LOGIT_ROWS)]
        log_probs = torch.log_softmax(torch.cat(rows), -1)
        targets = torch.tensor(window[1:])
        loss -= float(log_probs.gather(1, targets[:, None]).double().sum())
        count += len(targets)
    return math.exp(loss / count)


def served_formats(text: Text, _work: Path) -> list[Row]:
    """What `tightfit serve --format` gives, with either kind of KV cache."""
    kinds: list[tuple[str, str, bool | None, float | None]] = [
        ("`fp32`", "fp32", None, None),
        ("`bf16`", "bf16", None, None),
        ("`int8`", "int8", None, None),
        ("`int4`, the file's own Q4_1 (`auto`)", "auto", None, None),
        ("`llm_int8`, decode (W8A16)", "llm_int8", False, None),
        ("`llm_int8`, prefill", "llm_int8", True, None),
        ("LLM.int8() in full: `--llm-int8-threshold 6`", "llm_int8", True, OUTLIER_THRESHOLD),
        ("the same with `--llm-int8-threshold 3`", "llm_int8", True, 3.0),
        ("the same with `--llm-int8-threshold 1.5`", "llm_int8", True, 1.5),
    ]
    rows = []
    for name, fmt, use_many, threshold in kinds:
        full, small = (
            perplexity(harness.gguf(), text, fmt, kv=kv, use_many=use_many, threshold=threshold)
            for kv in ("auto", "int8")
        )
        rows.append(Row(name=name, perplexity=full, int8_kv=small))
        print(f"{name}: {full:.3f}, {small:.3f}", file=sys.stderr, flush=True)
    return rows


def rounded_formats(text: Text, work: Path) -> list[Row]:
    """What `tightfit quantize` writes."""
    samples = _spread(text.pool, SAMPLES)
    rows = []
    for fmt in ("int4", "int3"):
        for method in ("rtn", "hqq", "gptq"):
            calibration = Calibration(samples=samples) if method == "gptq" else None
            row = _rounded(text, work, fmt, method, calibration)
            rows.append(row)
    return rows


def _rounded(text: Text, work: Path, fmt: str, method: str, calibration: Calibration | None) -> Row:
    with tempfile.TemporaryDirectory(dir=work) as out:
        job = QuantizeJob(
            source=str(harness.gguf()), target=out, format=fmt, method=method,
            calibration=calibration,
        )  # fmt: skip
        started = time.monotonic()
        result = quantize_checkpoint(job)
        seconds = time.monotonic() - started
        value = perplexity(Path(out), text)
    print(f"{fmt} {method}: {value:.2f} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return Row(
        name=f"`{fmt}`, {method}",
        perplexity=value,
        bits=f"{result.bits_per_weight:.2f}",
        seconds=f"{seconds:.0f}",
    )


def _spread(pool: list[list[int]], count: int) -> list[list[int]]:
    return [pool[i * len(pool) // count] for i in range(count)]


def choices(text: Text, work: Path) -> list[Row]:
    """`int3` by GPTQ with few samples, chosen in several ways."""
    pool, model = text.small_pool, harness.gguf()
    sets = {
        f"random, seed {seed}": random.Random(seed).sample(pool, CHOICE_SAMPLES)
        for seed in range(RANDOM_SEEDS)
    }
    sets["`spread`"] = _spread(pool, CHOICE_SAMPLES)
    for name, hardest in (("`easy`", False), ("`hard`", True)):
        chosen = pick_samples(model, pool, CHOICE_SAMPLES, hardest=hardest)
        sets[name] = [list(sample) for sample in chosen]
    rows = []
    for name, samples in sets.items():
        row = _rounded(text, work, "int3", "gptq", Calibration(samples=samples))
        rows.append(Row(name=name, perplexity=row.perplexity))
    return rows


def plant_outliers(source: Path, target: Path) -> None:
    """The same function with a few hidden columns 20 times larger where they are multiplied: the
    norms' weights there times 20, the columns of what follows by 20."""
    target.mkdir()
    for file in source.glob("*.json"):
        (target / file.name).write_text(file.read_text())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    width = tensors["model.norm.weight"].shape[0]
    columns = torch.randperm(width, generator=torch.Generator().manual_seed(0))[:PLANTED_COLUMNS]
    followers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name, tensor in tensors.items():
        prefix, _, part = name.removesuffix(".weight").rpartition("layers.")
        number, _, kind = part.partition(".")
        if prefix and kind in followers:
            tensor[columns] *= PLANTED_FACTOR
            for follower in followers[kind]:
                tensors[f"{prefix}layers.{number}.{follower}.weight"][:, columns] /= PLANTED_FACTOR
    safetensors.torch.save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def planted(text: Text, work: Path) -> list[Row]:
    """With outlier features, where activations in plain int8 fail."""
    path = work / "planted"
    plant_outliers(harness.converted(), path)
    rows = [Row(name="`fp32`", perplexity=perplexity(path, text, "fp32"))]
    rows.append(Row(name="`int8`", perplexity=perplexity(path, text, "int8")))
    full = perplexity(path, text, "llm_int8", use_many=True, threshold=OUTLIER_THRESHOLD)
    rows.append(Row(name="LLM.int8() in full, prefill", perplexity=full))
    plain = perplexity(path, text, "llm_int8", use_many=True, threshold=math.inf)
    rows.append(Row(name="int8 × int8 without outlier columns", perplexity=plain))
    return rows


PARTS: dict[str, Callable[[Text, Path], list[Row]]] = {
    "served": served_formats,
    "rounded": rounded_formats,
    "choices": choices,
    "outliers": planted,
}


def table(rows: list[Row], base: float, title: str) -> str:
    """With each row's loss over `base`."""
    has_bits, has_kv = any(row.bits for row in rows), any(row.int8_kv for row in rows)
    head = [title, *(["bits per weight", "seconds to quantise"] if has_bits else []),
            "perplexity", "over `fp32`",
            *(["with `--kv-format int8`", "over the same without"] if has_kv else [])]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for row in rows:
        cells = [row.name, *([row.bits, row.seconds] if has_bits else [])]
        cells += [f"{row.perplexity:.2f}", _loss(row.perplexity, base)]
        if row.int8_kv is not None:
            cells += [f"{row.int8_kv:.2f}", _loss(row.int8_kv, row.perplexity)]
        elif has_kv:
            cells += ["not measured", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _loss(perplexity: float, base: float) -> str:
    return f"{100 * (perplexity / base - 1):+.2f} %"


def document(measures: dict[str, list[Row]], text: Text) -> str:
    """docs/quality.md."""
    served, rounded = measures["served"], measures["rounded"]
    base = served[0].perplexity
    loss = {row.name: row.perplexity / base - 1 for row in rounded}
    share = loss["`int4`, gptq"] / loss["`int4`, rtn"]
    outliers = measures["outliers"]
    return f"""# Quality

Written by `make quality` (`bench/quality.py`); do not edit.

Perplexity of SmolLM2-135M-Instruct on held-out text: {len(text.held_out)} windows of {WINDOW}
tokens of Debian's `fortunes`, every {HELD_OUT_EVERY}th of them, each window by itself. The others
are the text for calibration. The model comes from a GGUF in Q4_1, widened: `fp32` is that model,
whose weights lie on 4-bit grids of groups of 32 already, so that rounding them to other grids costs
more than it would cost the original. A model of this size suffers far more from few bits than one
of 175B.

## Formats that `tightfit serve` makes of it

{table(served, base, "format")}

Asked: at most +0.3 % for `int8` and `llm_int8`. `llm_int8` decodes as W8A16. In prefill, layers as
wide as those of a model of 6.7B parameters have activations in int8, too, but for features that
reach the threshold of 6.0; this model has no such layers. With a threshold given, all layers do
so, as the paper has it: a model this small has smaller outliers, and loses more (the paper's table
1 has +0.7 % at 125M, and nothing from 6.7B on). The file's own 4 bits lose only what rounding
their scales to bf16, and the LM head to `int8`, costs. All of attention reads keys and values from
the cache, those of its own window as well.

## What `tightfit quantize` writes

Groups of 64 (128 does not divide this model's width), the LM head in `int8`. GPTQ: {SAMPLES}
samples of {WINDOW} tokens, act-order.

{table(rounded, base, "format, method")}

`int4` by GPTQ loses {share:.2f} of what rounding to nearest loses (asked: at most 0.5). HQQ needs
no text. `int3` is usable by GPTQ only. Between them, layer by layer: [mixes.md](mixes.md).

## Which samples

`int3` by GPTQ with {CHOICE_SAMPLES} samples of {CHOICE_TOKENS} tokens out of
{len(text.small_pool)}, by `--sample-choice`. `easy` and `hard` go by the distance to prototypes
(arXiv 2206.14486).

{table(measures["choices"], base, "choice")}

Random choices differ among each other as much as from the rest: the default is `spread`.

## Outlier features

The same function, but {PLANTED_COLUMNS} of the 576 hidden columns are {PLANTED_FACTOR:g} times
larger where they meet a weight matrix, as LLM.int8() describes for large models. All activations in
int8 fail there; with the outlier columns in 16 bit they do not.

{table(outliers, outliers[0].perplexity, "format")}
"""


def read_measures() -> dict[str, list[Row]]:
    """What was measured before."""
    if not MEASURES.exists():
        return {}
    saved = json.loads(MEASURES.read_text())
    return {part: [Row(**row) for row in rows] for part, rows in saved.items()}


def write_measures(measures: dict[str, list[Row]]) -> None:
    """For the next time."""
    plain = {part: [dataclasses.asdict(row) for row in measures[part]] for part in PARTS}
    MEASURES.write_text(json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Measure everything, or some parts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", choices=tuple(PARTS), default=tuple(PARTS))
    args = parser.parse_args()
    torch.set_num_threads(harness.THREADS)
    measures, text = read_measures(), texts()
    if missing := set(PARTS) - set(args.only) - set(measures):
        parser.error(f"not measured yet, and wanted for the report: {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as work:
        for part in args.only:
            measures[part] = PARTS[part](text, Path(work))
    write_measures(measures)
    REPORT.write_text(document(measures, text))


if __name__ == "__main__":
    main()

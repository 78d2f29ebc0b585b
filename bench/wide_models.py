"""Checkpoints as wide as the 175B models, whose layers all name one stored block of random weights.

`torch.save` stores tensors that share memory once, so that 176 billion parameters of arithmetic
take the disk and the memory of one block, the embedding and the head. The files are ordinary `.bin`
shards.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.decoder_config import DecoderConfig, decoder_config

BLOOM_176B: dict[str, Any] = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 14336,
    "n_layer": 70,
    "n_head": 112,
    "vocab_size": 250880,
    "seq_length": 2048,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": None,
    "bos_token_id": 1,
}
OPT_175B: dict[str, Any] = {
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "hidden_size": 12288,
    "ffn_dim": 49152,
    "num_hidden_layers": 96,
    "num_attention_heads": 96,
    "vocab_size": 50272,
    "word_embed_proj_dim": 12288,
    "max_position_embeddings": 2048,
    "eos_token_id": None,
    "bos_token_id": 2,
}
LAYER_COUNTS = {"bloom": "n_layer", "opt": "num_hidden_layers"}

PATTERN_ITEMS = 2**25 - 39
"""A prime: no two rows of a weight begin at the same place of the repeated pattern."""
WEIGHT_STD = 0.02
POLL_S = 0.05
LOOKS_BETWEEN_FAMILIES = 20


def resized(config: Mapping[str, Any], *, layers: int, vocab_size: int) -> dict[str, Any]:
    """The same width with fewer layers and tokens."""
    count = LAYER_COUNTS[config["model_type"]]
    return {**config, count: layers, "vocab_size": vocab_size}


class RandomWeights:
    """Normal values of a fixed seed, repeated: 822 million of them take two seconds, not two
    minutes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(PATTERN_ITEMS, generator=generator).mul_(WEIGHT_STD)
        self._values, self._next = values.to(torch.bfloat16), 0

    def tensor(self, name: str, shape: Sequence[int]) -> Tensor:
        """bf16, each call's from another place of the pattern; a norm's weights are about 1."""
        out = torch.empty(*shape, dtype=torch.bfloat16)
        flat, done = out.view(-1), 0
        while done < len(flat):
            part = self._values[self._next :][: len(flat) - done]
            flat[done : done + len(part)] = part
            done += len(part)
            self._next = (self._next + len(part)) % PATTERN_ITEMS
        is_norm = ("norm" in name or "ln_" in name) and name.endswith(".weight")
        return out.add_(1) if is_norm else out


def save_source(path: Path, config: Mapping[str, Any]) -> None:
    """A checkpoint in bf16, not quantised; its layers are one."""
    path.mkdir(parents=True)
    decoder, random = decoder_config(config), RandomWeights()
    block = {name: random.tensor(name, shape) for name, shape in decoder.layer_tensors(0)}
    tensors = dict(_repeated(decoder, block, ""))
    for name, shape in _outer_tensors(decoder).items():
        tensors[name] = random.tensor(name, shape)
    prefix = decoder.names.prefixes[0]
    torch.save({prefix + name: t for name, t in tensors.items()}, path / "pytorch_model.bin")
    _write_rest(path, config)


def save_repeated(path: Path, quantized: Path, config: Mapping[str, Any]) -> None:
    """A quantised checkpoint of any number of layers and tokens, out of the first block of another.

    Args:
        path: directory to write.
        quantized: what `tightfit quantize` made of a model of this width.
        config: as it is to be, `quantization_config` aside.
    """
    path.mkdir(parents=True)
    source = open_checkpoint(quantized)
    whole = {**config, "quantization_config": source.config["quantization_config"]}
    decoder, random = decoder_config(whole), RandomWeights()
    prefix = decoder.names.prefixes[0]
    first = prefix + _block_prefix(decoder).format(i=0)
    block = {
        name.removeprefix(prefix): source.read(name)
        for name in source.names()
        if name.startswith(first)
    }
    outer = ((name, random.tensor(name, shape)) for name, shape in _outer_tensors(decoder).items())
    files = {"blocks": _repeated(decoder, block, prefix), "rest": _named(outer, prefix)}
    weight_map = {}
    for label, tensors in files.items():
        file = f"pytorch_model-{label}.bin"
        state = dict(tensors)
        torch.save(state, path / file)
        weight_map |= dict.fromkeys(state, file)
    source.close()
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _write_rest(path, whole)


def _outer_tensors(decoder: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """What is outside the blocks; a tied head is the embedding."""
    return dict([*decoder.embedding_tensors(), *decoder.head_tensors()])


def _block_prefix(decoder: DecoderConfig) -> str:
    return decoder.names.attn_norm.partition("{i}")[0] + "{i}."


def _repeated(
    decoder: DecoderConfig, block: Mapping[str, Tensor], prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of layer 0 under the names of every layer."""
    pattern = _block_prefix(decoder)
    for layer in range(decoder.num_layers):
        for name, tensor in block.items():
            rest = name.removeprefix(pattern.format(i=0))
            yield prefix + pattern.format(i=layer) + rest, tensor


def _named(tensors: Iterator[tuple[str, Tensor]], prefix: str) -> Iterator[tuple[str, Tensor]]:
    return ((prefix + name, tensor) for name, tensor in tensors)


def _write_rest(path: Path, config: Mapping[str, Any]) -> None:
    """The config, and a tokenizer that spells in bytes and knows every token id."""
    (path / "config.json").write_text(json.dumps(config, indent=2))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet[: config["vocab_size"]])}
    vocab |= {f"<{i}>": i for i in range(len(vocab), config["vocab_size"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process; 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon:")), 0)


class PeakMemory:
    """While the block runs, watches the anonymous memory of a process and all that it starts:
    `peak_bytes` of all together."""

    def __init__(self, pid: int) -> None:
        self._process, self._done = psutil.Process(pid), threading.Event()
        self.peak_bytes = 0

    def _watch(self) -> None:
        looks = 0
        while not self._done.wait(POLL_S):
            if looks % LOOKS_BETWEEN_FAMILIES == 0:
                family = self._family()
            looks += 1
            self.peak_bytes = max(self.peak_bytes, sum(anonymous_bytes(pid) for pid in family))

    def _family(self) -> list[int]:
        """It and its children's children: dear to find, as all processes are looked at."""
        try:
            family = [self._process, *self._process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []
        return [process.pid for process in family]

    def __enter__(self) -> PeakMemory:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def quantize(source: Path, target: Path, *flags: str) -> tuple[dict[str, Any], int]:
    """`tightfit quantize`: what it says of the result, and the most anonymous memory that it took.

    Raises:
        RuntimeError: it failed; its own words.
    """
    command = [
        sys.executable, "-m", "tightfit.cluster.cli", "quantize", str(source), str(target),
        "--json", *flags,
    ]  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Threads that spin while they wait take ten times as long beside other work.
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    with PeakMemory(process.pid) as memory:
        out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors}")
    return json.loads(out), memory.peak_bytes

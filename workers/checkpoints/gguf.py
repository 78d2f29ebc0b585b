"""One GGUF file (llama.cpp's) seen as a Hugging Face checkpoint.

Quantised tensors are widened to fp32 when they are read. Where a format of ours holds the same
numbers (`stored.GGUF_SYMMETRIC`), the config says so, and the blocks can be read as well.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from tightfit.workers.checkpoints.base import DTYPE_NAMES, MappedFile, Place, check_shape
from tightfit.workers.checkpoints.gguf_config import huggingface_config
from tightfit.workers.checkpoints.gguf_header import TensorInfo, read_header
from tightfit.workers.errors import CheckpointError
from tightfit.workers.stored import GGUF_SYMMETRIC, gguf_section

PLAIN: Final = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
"""Types that are read as they are."""
WIDENED: Final = (
    Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0,
    Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K,
)  # fmt: skip
"""Types that are widened to fp32."""

GLOBAL_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
IGNORED: Final = frozenset({"rope_freqs.weight"})
"""Tensors that the config speaks for (see `gguf_config`)."""

BLOCKS: Final = "_blocks"
"""Behind a tensor's name: its bytes, uint8 [N, blocks of a row, bytes of a block]."""

WIDEN_ELEMENTS: Final = 2**20
"""Elements widened at a time: bounds the scratch of numpy's intermediates to some 20 MB."""


class GGUFCheckpoint:
    """See `Checkpoint`. The header is checked in full when it is opened.

    llama.cpp stores the rows of Q and K of the llama architecture in another order within each head
    (the two halves of a rotary pair side by side); `read` puts them back.

    Raises:
        CheckpointError: missing, truncated, malformed, or of an architecture, setting or tensor
            that is not supported.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: MappedFile | None = MappedFile(path)
        header = read_header(self._file)
        config = huggingface_config(path, header, self._rope_factors)
        self._tensors = {
            self._hf_name(name): info
            for name, info in header.tensors.items()
            if name not in IGNORED
        }
        types = {
            name.removesuffix(".weight"): info.kind.name
            for name, info in self._tensors.items()
            if info.kind.name in GGUF_SYMMETRIC and name.startswith("model.layers.")
        }
        section = {"quantization_config": gguf_section(types)} if types else {}
        self.config: Mapping[str, Any] = config | section
        heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        is_permuted = config["model_type"] == "llama"
        self._permuted_heads = {"q_proj": heads, "k_proj": kv_heads} if is_permuted else {}

    @property
    def source_format(self) -> str:
        """The type of most of its elements, and whether it has to be widened."""
        sizes: Counter[Kind] = Counter()
        for info in self._tensors.values():
            sizes[info.kind] += math.prod(info.shape)
        kind = sizes.most_common(1)[0][0] if sizes else Kind.F32
        if kind in PLAIN:
            return f"GGUF {DTYPE_NAMES[PLAIN[kind]]}"
        if kind.name in GGUF_SYMMETRIC:
            return f"GGUF {kind.name}"
        return f"GGUF {kind.name}, widened to fp32 before quantising"

    def _hf_name(self, name: str) -> str:
        if name in GLOBAL_NAMES:
            return GLOBAL_NAMES[name]
        match name.split("."):
            case ["blk", number, role, ("weight" | "bias") as part] if (
                role in LAYER_NAMES and number.isdecimal()
            ):
                return f"model.layers.{int(number)}.{LAYER_NAMES[role]}.{part}"
        raise CheckpointError(
            self._path, name, "is no tensor of a llama or qwen2 model; use the original checkpoint"
        )

    def _rope_factors(self, info: TensorInfo) -> Tensor:
        """The values of `rope_freqs.weight`, fp32."""
        return self._widen(info).float().flatten()

    def _info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise CheckpointError(
                self._path, name, "is not in the file, though its metadata calls for it; "
                "the conversion is incomplete, convert the model again"
            )  # fmt: skip
        return self._tensors[name]

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `Checkpoint`."""
        return self._info(name).shape

    def dtype(self, name: str) -> str:
        """See `Checkpoint`; a quant's name is llama.cpp's: "Q4_1"."""
        kind = self._info(name).kind
        return DTYPE_NAMES[PLAIN[kind]] if kind in PLAIN else str(kind.name)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`; with `BLOCKS` behind the name, too."""
        return self._info(name.removesuffix(BLOCKS)).nbytes

    def place(self, name: str) -> Place:
        """See `Checkpoint`."""
        info = self._info(name)
        heads = self._check_heads(name, info)
        kind = info.kind.name if heads is None else f"{info.kind.name} by {heads} heads"
        return Place(path=self._path, offset=info.offset, kind=kind, shape=info.shape)

    def validate(
        self, wanted: Iterable[tuple[str, tuple[int, ...]]], integers: Container[str] = ()
    ) -> None:
        """See `Checkpoint`."""
        for name, shape in wanted:
            info = self._info(name)
            check_shape(self._path, name, expected=shape, found=info.shape)
            self._check_kind(info)
            self._check_heads(name, info)

    def _check_kind(self, info: TensorInfo) -> None:
        if info.kind not in PLAIN and info.kind not in WIDENED:
            known = ", ".join(kind.name for kind in (*PLAIN, *WIDENED))
            raise CheckpointError(
                self._path, info.name, f"has type {info.kind.name}; supported are {known}"
            )

    def _check_heads(self, name: str, info: TensorInfo) -> int | None:
        """Heads whose rows llama.cpp reordered, if it did."""
        heads = self._permuted_heads.get(name.split(".")[-2])
        if heads is not None and info.shape[0] % (2 * heads):
            raise CheckpointError(
                self._path, info.name, f"its {info.shape[0]} rows are not of {heads} heads of even "
                "size, as the metadata says; convert the model again"
            )  # fmt: skip
        return heads

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; with `BLOCKS` behind the name, a tensor's bytes."""
        is_packed = name.endswith(BLOCKS)
        name = name.removesuffix(BLOCKS)
        info = self._info(name)
        self._check_kind(info)
        heads = self._check_heads(name, info)
        tensor = self._packed(info) if is_packed else self._widen(info)
        if heads is None:
            return tensor
        # [heads, D / 2, 2] back to [heads, 2, D / 2]
        pairs = tensor.view(heads, info.shape[0] // heads // 2, 2, -1)
        return pairs.transpose(1, 2).reshape(tensor.shape)

    def _packed(self, info: TensorInfo) -> Tensor:
        items, size = GGML_QUANT_SIZES[info.kind]
        shape = (*info.shape[:-1], info.shape[-1] // items, size)
        return self._mapped(info).tensor(info.offset, torch.uint8, shape)

    def _mapped(self, info: TensorInfo) -> MappedFile:
        if self._file is None:
            raise CheckpointError(self._path, info.name, "was read after the file was closed")
        return self._file

    def _widen(self, info: TensorInfo) -> Tensor:
        file = self._mapped(info)
        if info.kind in PLAIN:
            return file.tensor(info.offset, PLAIN[info.kind], info.shape)
        width = info.shape[-1]
        out = torch.empty(info.shape)
        flat = out.view(-1, width)
        row_bytes = info.nbytes // flat.shape[0]
        step = max(1, WIDEN_ELEMENTS // width)
        for first in range(0, flat.shape[0], step):
            rows = min(step, flat.shape[0] - first)
            packed = np.frombuffer(
                file.buffer, np.uint8, rows * row_bytes, info.offset + first * row_bytes
            )
            wide = dequantize(packed.reshape(rows, row_bytes), info.kind)
            flat[first : first + rows] = torch.from_numpy(wide)
        return out

    def close(self) -> None:
        """See `Checkpoint`."""
        self._file = None

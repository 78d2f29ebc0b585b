"""A Hugging Face config out of a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from tightfit.workers.checkpoints.gguf_header import Header, LongArray, TensorInfo
from tightfit.workers.errors import CheckpointError

ARCHITECTURES: Final = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
"""GGUF's name of an architecture (transformers' model_type too) → transformers' class."""

REFUSED: Final = {
    "expert_count": "experts",
    "attention.sliding_window": "a sliding window",
    "attention.max_alibi_bias": "ALiBi",
    "attention.clamp_kqv": "clamped attention inputs",
    "logit_scale": "scaled logits",
    "residual_scale": "scaled residuals",
    "embedding_scale": "scaled embeddings",
    "attention.scale": "scaled attention",
}
"""Settings that change what is computed and that such configs do not have."""

SCALINGS: Final = ("linear", "yarn")

LLAMA3_LOW_FREQ_FACTOR: Final = 1.0
LLAMA3_HIGH_FREQ_FACTOR: Final = 4.0
LLAMA3_ORIGINAL_CONTEXT: Final = 8192
"""Of Llama 3.1, 3.2 and 3.3: GGUF keeps the factors that follow from these, not the settings."""


class _Metadata:
    """Typed access to the values of one architecture."""

    def __init__(self, path: Path, header: Header) -> None:
        self._path, self._values = path, header.metadata
        self.architecture = self._values.get("general.architecture")

    def _fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(self._path, None, f"metadata: {key} {problem}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive number."""
        full = f"{self.architecture}.{key}"
        value = self._values.get(full, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]  # given per layer, all the same
        if value is None:
            raise self._fail(full, "is missing; convert the model again")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self._fail(full, f"is {value!r}; a positive whole number is needed")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive, finite number."""
        full = f"{self.architecture}.{key}"
        value = self._values.get(full, default)
        if value is None:
            raise self._fail(full, "is missing; convert the model again")
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise self._fail(full, f"is {value!r}; a positive number is needed")
        return float(value)

    def token_id(self, name: str) -> int | None:
        """A special token's id, if there is one."""
        value = self._values.get(f"tokenizer.ggml.{name}_token_id")
        return value if isinstance(value, int) else None

    def text(self, key: str) -> str | None:
        """A string, if there is one."""
        value = self._values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, str) else None

    def check(self) -> None:
        """Refuse by name what would be computed wrongly."""
        if self.architecture not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise CheckpointError(
                self._path,
                None,
                f"GGUF architecture {self.architecture!r} is not supported; supported are {known}. "
                "Use the original checkpoint if its family is",
            )
        count = self._values.get("split.count", 1)
        if isinstance(count, int) and count > 1:
            raise self._fail("split.count", f"is {count}; merge the parts with llama-gguf-split")
        for key, what in REFUSED.items():
            if value := self._values.get(f"{self.architecture}.{key}"):
                raise self._fail(
                    f"{self.architecture}.{key}", f"is {value!r}: {what} is not supported from GGUF"
                )

    def vocabulary(self, header: Header) -> int:
        """Rows of the embedding, which may be more than there are tokens."""
        embedding = header.tensors.get("token_embd.weight")
        if embedding is not None:
            return embedding.shape[0]
        tokens = self._values.get("tokenizer.ggml.tokens")
        return self.integer("vocab_size", tokens.length if isinstance(tokens, LongArray) else None)


def huggingface_config(
    path: Path, header: Header, rope_factors: Callable[[TensorInfo], Tensor]
) -> dict[str, Any]:
    """What config.json would say.

    Args:
        path: for errors.
        header: the file's.
        rope_factors: reads `rope_freqs.weight`, fp32.
    Raises:
        CheckpointError: a setting is missing, malformed or not supported.
    """
    meta = _Metadata(path, header)
    meta.check()
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if meta.integer(key, head_dim) != head_dim:
            raise CheckpointError(
                path,
                None,
                f"metadata: {meta.architecture}.{key} is {meta.integer(key)}, but heads have "
                f"{head_dim}; models where they differ are not supported from GGUF",
            )
    theta = meta.number("rope.freq_base", 10_000.0)
    scaling = _rope_scaling(path, meta)
    factors = header.tensors.get("rope_freqs.weight")
    if factors is not None:
        scaling = _llama3_scaling(path, rope_factors(factors), head_dim, theta)
    architecture = str(meta.architecture)
    return {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "vocab_size": meta.vocabulary(header),
        "max_position_embeddings": meta.integer("context_length"),
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in header.tensors,
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": meta.token_id("bos"),
        "eos_token_id": meta.token_id("eos"),
        "pad_token_id": meta.token_id("padding"),
    }


def _rope_scaling(path: Path, meta: _Metadata) -> dict[str, Any] | None:
    kind = meta.text("rope.scaling.type")
    if kind is None or kind == "none":
        return None
    if kind not in SCALINGS:
        raise CheckpointError(
            path,
            None,
            f"metadata: rope.scaling.type is {kind!r}; supported are {', '.join(SCALINGS)}",
        )
    scaling = {"rope_type": kind, "factor": meta.number("rope.scaling.factor")}
    if kind == "yarn":
        original = meta.integer("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3_scaling(
    path: Path, factors: Tensor, head_dim: int, theta: float
) -> dict[str, Any] | None:
    """The settings of transformers' "llama3" from which the stored factors follow."""
    if bool((factors == 1).all()):
        return None
    factor = float(factors.max())
    inverse = theta ** -(torch.arange(0, head_dim, 2).double() / head_dim)
    turns = LLAMA3_ORIGINAL_CONTEXT * inverse / (2 * math.pi)
    smooth = (turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR)
    smooth = smooth.clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not torch.allclose(factors.double(), expected, rtol=1e-3):
        raise CheckpointError(
            path,
            "rope_freqs.weight",
            "holds frequency factors that are not Llama 3's; use the original checkpoint, whose "
            "config.json says how they are made",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": LLAMA3_ORIGINAL_CONTEXT,
    }

"""GGUF files of the llama architecture. Quantised tensors are widened to fp32 when read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from tightfit.workers.checkpoint import check_shape
from tightfit.workers.errors import CheckpointError

LAYER_NAMES = {
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
GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
DAMAGED = (ValueError, IndexError, KeyError, OSError, TypeError, OverflowError, MemoryError)


class GGUFCheckpoint:
    """One GGUF file (the format of llama.cpp, read by its own `gguf` package).

    llama.cpp stores the rows of Q and K in another order within each head (rotary pairs side by side);
    `read` puts them back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._reader: Any = gguf.GGUFReader(str(path))
            self._tensors = self._map_tensors()
            self.config: Mapping[str, Any] = self._read_config()
        except DAMAGED as error:
            raise CheckpointError(
                path, None, f"cannot be read as GGUF ({error}); it is truncated or damaged"
            ) from error
        kinds = sorted({t.tensor_type.name for t in self._reader.tensors})
        self.source_format = f"GGUF ({', '.join(kinds)}), quantised tensors widened to fp32"

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _map_tensors(self) -> dict[str, Any]:
        architecture = self._field("general.architecture")
        if architecture != "llama":
            raise CheckpointError(
                self._path, None, f"architecture is {architecture!r}; supported from GGUF is 'llama'"
            )
        found: dict[str, Any] = {}
        for tensor in self._reader.tensors:
            if tensor.name == "rope_freqs.weight":
                raise CheckpointError(
                    self._path, tensor.name, "frequency tables are not supported; use the original "
                    "checkpoint, whose config.json says how they were made"
                )  # fmt: skip
            found[self._hf_name(tensor.name)] = tensor
        return found

    def _hf_name(self, name: str) -> str:
        if name in GLOBAL_NAMES:
            return GLOBAL_NAMES[name]
        block, _, rest = name.removeprefix("blk.").partition(".")
        role, _, kind = rest.rpartition(".")
        if not name.startswith("blk.") or role not in LAYER_NAMES:
            raise CheckpointError(self._path, name, "is not a tensor of the llama architecture")
        return f"model.layers.{block}.{LAYER_NAMES[role]}.{kind}"

    def _read_config(self) -> dict[str, Any]:
        """What config.json would say."""
        hidden = int(self._field("llama.embedding_length"))
        heads = int(self._field("llama.attention.head_count"))
        self._heads = heads
        self._kv_heads = int(self._field("llama.attention.head_count_kv", heads))
        rope: dict[str, Any] = {
            "rope_type": "default",
            "rope_theta": float(self._field("llama.rope.freq_base", 10000.0)),
        }
        scaling = self._field("llama.rope.scaling.type", "none")
        if scaling != "none":
            rope["rope_type"] = scaling
            rope["factor"] = float(self._field("llama.rope.scaling.factor", 1.0))
            original = self._field("llama.rope.scaling.original_context_length")
            if original:
                rope["original_max_position_embeddings"] = int(original)
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": int(self._field("llama.feed_forward_length")),
            "num_hidden_layers": int(self._field("llama.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": self._kv_heads,
            "head_dim": int(self._field("llama.attention.key_length", hidden // heads)),
            "rms_norm_eps": float(self._field("llama.attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": int(self._field("llama.context_length")),
            "vocab_size": int(self._tensors["model.embed_tokens.weight"].shape[1]),
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "rope_parameters": rope,
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self._tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self._tensors,
            "hidden_act": "silu",
            "bos_token_id": self._field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._field("tokenizer.ggml.eos_token_id"),
        }

    def names(self) -> frozenset[str]:
        """See `Checkpoint`."""
        return frozenset(self._tensors)

    def nbytes(self, name: str) -> int:
        """See `Checkpoint`."""
        return int(self._tensors[name].n_bytes)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def read(self, name: str) -> Tensor:
        """See `Checkpoint`; fp32."""
        tensor = self._tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except (NotImplementedError, *DAMAGED) as error:
            raise CheckpointError(
                self._path, name, f"quantisation {tensor.tensor_type.name} cannot be read: {error}"
            ) from error
        weight = torch.tensor(values, dtype=torch.float32).view(self._shape(name))
        if ".self_attn.q_proj." in name:
            return _unpermute(weight, self._heads)
        if ".self_attn.k_proj." in name:
            return _unpermute(weight, self._kv_heads)
        return weight

    def validate(self, wanted: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """See `Checkpoint`."""
        for name, shape in wanted:
            if name not in self._tensors:
                raise CheckpointError(
                    self._path, name, "is missing, but the metadata says that the model has it"
                )
            check_shape(self._path, name, self._shape(name), shape)

    def close(self) -> None:
        """See `Checkpoint`."""
        self._tensors = {}
        self._reader = None


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads, D / 2, 2] back to Hugging Face's [heads, 2, D / 2]."""
    rows = weight.shape[0] // heads // 2
    return weight.view(heads, rows, 2, -1).transpose(1, 2).reshape(weight.shape)

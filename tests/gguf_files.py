"""Small GGUF files, written with llama.cpp's own package."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from gguf.constants import GGMLQuantizationType as Kind

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 4, 2, 8, 32, 64, 50
ROLES = {
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k": ("self_attn.k_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v": ("self_attn.v_proj", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN)),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN)),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER)),
    "attn_norm": ("input_layernorm", (HIDDEN,)),
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,)),
}


def _permuted(weight, heads):
    """As llama.cpp's converter stores Q and K of a llama model."""
    shape = weight.shape
    return weight.reshape(heads, 2, shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(shape)


def _random(rng, shape):
    return rng.standard_normal(shape).astype(np.float32)


class Model:
    """A one-layer model: what it is in Hugging Face's names, and as a GGUF file."""

    def __init__(
        self, path, *, arch="llama", kind=Kind.F32, head=True, biases=False, extra=None, kinds=None
    ):
        self.path = path
        self.expected = {}
        writer = gguf.GGUFWriter(path, arch)
        settings = {
            "context_length": 128,
            "embedding_length": HIDDEN,
            "block_count": 1,
            "feed_forward_length": INNER,
            "attention.head_count": HEADS,
            "attention.head_count_kv": KV_HEADS,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.freq_base": 5e5,
        } | (extra or {})
        for key, value in settings.items():
            full = key if key.startswith(("split.", "general.")) else f"{arch}.{key}"
            if isinstance(value, str):
                writer.add_string(full, value)
            elif isinstance(value, float):
                writer.add_float32(full, value)
            elif isinstance(value, list):
                writer.add_array(full, value)
            elif value is not None:
                writer.add_uint32(full, value)
        writer.add_token_list([f"t{i}" for i in range(VOCAB)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        rng = np.random.default_rng(0)
        self._add(writer, "token_embd.weight", "model.embed_tokens.weight", (VOCAB, HIDDEN), rng)
        self._add(writer, "output_norm.weight", "model.norm.weight", (HIDDEN,), rng)
        if head:
            self._add(writer, "output.weight", "lm_head.weight", (VOCAB, HIDDEN), rng)
        for role, (name, shape) in ROLES.items():
            full = f"model.layers.0.{name}.weight"
            of_role = (kinds or {}).get(role, kind)
            self._add(writer, f"blk.0.{role}.weight", full, shape, rng, of_role, arch == "llama")
            if biases and role in ("attn_q", "attn_k", "attn_v"):
                full = f"model.layers.0.{name}.bias"
                self._add(
                    writer, f"blk.0.{role}.bias", full, shape[:1], rng, Kind.F32, arch == "llama"
                )
        self.finish = lambda: self._finish(writer)
        self.writer = writer

    def _add(self, writer, name, full, shape, rng, kind=Kind.F32, permute=False):
        weight = _random(rng, shape)
        if len(shape) == 1 and "norm" in name:
            kind = Kind.F32
        packed = gguf.quants.quantize(weight, kind)
        wide = gguf.quants.dequantize(packed, kind).reshape(shape)
        self.expected[full] = torch.from_numpy(wide.copy())
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if permute and heads:
            packed = _permuted(packed, heads)
        writer.add_tensor(name, packed, raw_dtype=kind)

    def _finish(self, writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return self.path

"""Tiny random checkpoints of every family, made with transformers, and its greedy answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 131
LAYERS = 5


def _bloom(**changes: Any) -> Any:
    sizes = {"hidden_size": 48, "n_head": 6, "n_layer": LAYERS, "vocab_size": VOCAB}
    return BloomForCausalLM(BloomConfig(**{**sizes, "seq_length": 512, **changes}))


def _opt(**changes: Any) -> Any:
    sizes = {
        "hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": LAYERS, "ffn_dim": 96,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "word_embed_proj_dim": 48,
    }  # fmt: skip
    return OPTForCausalLM(OPTConfig(**{**sizes, **changes}))


def _llama_sizes(**changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_hidden_layers": LAYERS, "intermediate_size": 80, "vocab_size": VOCAB,
        "max_position_embeddings": 512,
    }  # fmt: skip
    return {**sizes, **changes}


def _llama(**changes: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**_llama_sizes(**changes)))


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


VARIANTS = {
    "bloom": lambda: _bloom(),
    "bloom-residual-after-norm": lambda: _bloom(apply_residual_connection_post_layernorm=True),
    "bloom-12-heads": lambda: _bloom(n_head=12),
    "opt": lambda: _opt(),
    "opt-350m": lambda: _opt(word_embed_proj_dim=32, do_layer_norm_before=False),
    "opt-no-bias": lambda: _opt(enable_bias=False, layer_norm_elementwise_affine=False),
    "opt-gelu": lambda: _opt(activation_function="gelu", _remove_final_layer_norm=True),
    "llama": lambda: _llama(),
    "llama-mha-tied": lambda: _llama(num_key_value_heads=4, tie_word_embeddings=True),
    "llama-head-dim": lambda: _llama(head_dim=20),
    "llama-biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama-linear": lambda: _llama(**_rope("linear", factor=2.0)),
    "llama-dynamic": lambda: _llama(**_rope("dynamic", factor=2.0)),
    "llama-llama3": lambda: _llama(
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        )
    ),
    "llama-yarn": lambda: _llama(**_rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama-yarn-mscale": lambda: _llama(
        **_rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=128,
            mscale=0.7,
            mscale_all_dim=0.9,
            beta_fast=16.0,
            beta_slow=2.0,
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_llama_sizes(sliding_window=None))),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**_llama_sizes(sliding_window=320))),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_llama_sizes(tie_word_embeddings=True))),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """A saved checkpoint and the transformers model that it was saved from."""

    path: Path
    hf: Any

    @torch.no_grad()
    def log_probs(self, token_ids: list[int]) -> torch.Tensor:
        """Next-token log-probabilities after every token, [T, V] fp32."""
        return torch.log_softmax(self.hf(torch.tensor([token_ids])).logits[0].float(), dim=-1)

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation without a KV cache: nothing shared with what is tested."""
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.log_probs(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def build(variant: str, path: Path, **save: Any) -> TinyModel:
    """Make and save one of `VARIANTS` with weights large enough that greedy tokens vary."""
    torch.manual_seed(sum(map(ord, variant)))
    model = VARIANTS[variant]().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 0.15))
    model.save_pretrained(path, **save)
    return TinyModel(path=path, hf=model)

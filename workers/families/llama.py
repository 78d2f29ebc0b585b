"""The Llama family: rotary positions, RMSNorm, gated SiLU, grouped KV heads; Mistral and Qwen2
too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tightfit.workers.decoder_config import (
    MAX_LAYERS,
    ConfigReader,
    DecoderConfig,
    HFConfig,
    Norm,
    Position,
    Rope,
    TensorNames,
)
from tightfit.workers.errors import UnsupportedModelError

NAMES = TensorNames(
    prefixes=("model.", ""),
    embedding="embed_tokens",
    final_norm="norm",
    attn_norm="layers.{i}.input_layernorm",
    qkv=(
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    attn_out="layers.{i}.self_attn.o_proj",
    mlp_norm="layers.{i}.post_attention_layernorm",
    mlp_up=("layers.{i}.mlp.gate_proj", "layers.{i}.mlp.up_proj"),
    mlp_down="layers.{i}.mlp.down_proj",
)

ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def from_config(config: HFConfig) -> DecoderConfig:
    """Llama and what shares its config (SmolLM2 among them); see
    `decoder_config.decoder_config`."""
    read = ConfigReader(config)
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    if config.get("head_dim") is None and hidden % heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}, and "
            f"there is no head_dim"
        )
    head_dim = read.integer("head_dim", default=hidden // heads)
    if head_dim % 2:
        raise UnsupportedModelError(
            f"config.json: a head_dim of {head_dim} is odd; rotary positions turn pairs of features"
        )
    attention_bias = read.flag("attention_bias", False)
    max_position = read.integer("max_position_embeddings")
    read.only("sliding_window", max_position)
    read.only("partial_rotary_factor", 1.0)
    return DecoderConfig(
        family="llama",
        num_layers=read.integer("num_hidden_layers", at_most=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=read.integer("num_key_value_heads", default=heads),
        head_dim=head_dim,
        intermediate_size=read.integer("intermediate_size"),
        vocab_size=read.integer("vocab_size"),
        max_position=max_position,
        position=Position.ROTARY,
        norm=Norm.RMS,
        norm_eps=read.number("rms_norm_eps", 1e-6),
        norm_bias=False,
        activation=read.activation("hidden_act", "silu"),
        gated_mlp=True,
        qkv_bias=attention_bias,
        attn_out_bias=attention_bias,
        mlp_bias=read.flag("mlp_bias", False),
        embedding_size=hidden,
        rope=_rope(config, max_position),
        tied_head=read.flag("tie_word_embeddings", False),
        eos_token_ids=read.eos_token_ids(),
        bos_token_id=read.bos_token_id(),
        names=NAMES,
    )


DEFAULT_WINDOW = 4096
"""What transformers takes when config.json of a Mistral or Qwen2 model has no sliding_window; null
means that there is none."""


def from_mistral_config(config: HFConfig) -> DecoderConfig:
    """Mistral: Llama with a sliding window; up to the window attention is full, so it is the
    context."""
    return _cut_to_window(from_config({**config, "sliding_window": None}), config)


def from_qwen2_config(config: HFConfig) -> DecoderConfig:
    """Qwen2: Llama with biases on Q, K and V only, and a window that is seldom switched on."""
    base = {**config, "sliding_window": None, "attention_bias": False}
    decoder = replace(from_config(base), qkv_bias=True)
    uses_window = ConfigReader(config).flag("use_sliding_window", False)
    return _cut_to_window(decoder, config) if uses_window else decoder


def _cut_to_window(decoder: DecoderConfig, config: HFConfig) -> DecoderConfig:
    if config.get("sliding_window", DEFAULT_WINDOW) is None:
        return decoder
    window = ConfigReader(config).integer("sliding_window", default=DEFAULT_WINDOW)
    if window >= decoder.max_position:
        return decoder
    note = (
        f"sliding window: the context is limited to the window's {window} tokens "
        f"(of {decoder.max_position}), within which attention is exact"
    )
    return replace(decoder, max_position=window, notes=(*decoder.notes, note))


def _rope(config: HFConfig, max_position: int) -> Rope:
    """From transformers 5's `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    parameters: Mapping[str, Any] = config.get(key) or {}
    if not isinstance(parameters, Mapping):
        raise UnsupportedModelError(f"config.json: {key} is {parameters!r}, not an object")
    read = ConfigReader(parameters)
    theta = read.number("rope_theta", ConfigReader(config).number("rope_theta", 10000.0))
    if theta <= 0:
        raise UnsupportedModelError(f"config.json: rope_theta is {theta:g}, not positive")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KINDS:
        raise UnsupportedModelError(
            f"config.json: rope_type is {kind!r}; supported are {', '.join(ROPE_KINDS)}"
        )
    read.only("partial_rotary_factor", 1.0)
    if kind == "default":
        return Rope(theta=theta)
    original = read.integer(
        "original_max_position_embeddings",
        default=ConfigReader(config).integer(
            "original_max_position_embeddings", default=max_position
        ),
    )
    if kind == "yarn" and parameters.get("factor") is None:
        factor = max_position / original
    else:
        factor = read.number("factor", 0.0)
    if factor < 1.0:
        raise UnsupportedModelError(
            f"config.json: rope_type {kind!r} needs a factor of at least 1, found {factor:g}"
        )
    return Rope(
        theta=theta,
        kind=kind,
        factor=factor,
        low_freq_factor=read.number("low_freq_factor", 1.0),
        high_freq_factor=read.number("high_freq_factor", 4.0),
        original_max_position=original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=_attention_factor(parameters, factor) if kind == "yarn" else 1.0,
        truncate=read.flag("truncate", True),
    )


def _attention_factor(parameters: Mapping[str, Any], factor: float) -> float:
    """YaRN's temperature (arXiv 2309.00071, eq. 22), or the ratio that mscale and mscale_all_dim
    give."""
    read = ConfigReader(parameters)
    if parameters.get("attention_factor") is not None:
        return read.number("attention_factor", 1.0)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    one, all_dims = read.number("mscale", 0.0), read.number("mscale_all_dim", 0.0)
    if one and all_dims:
        return mscale(one) / mscale(all_dims)
    return mscale(1.0)

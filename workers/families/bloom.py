"""BLOOM: ALiBi, LayerNorm, fused QKV by head, embedding norm, tied head."""

from __future__ import annotations

from tightfit.workers.decoder_config import (
    MAX_LAYERS,
    Activation,
    ConfigReader,
    DecoderConfig,
    HFConfig,
    Norm,
    Position,
    TensorNames,
)
from tightfit.workers.errors import UnsupportedModelError

NAMES = TensorNames(
    prefixes=("transformer.", ""),
    embedding="word_embeddings",
    embedding_norm="word_embeddings_layernorm",
    final_norm="ln_f",
    attn_norm="h.{i}.input_layernorm",
    qkv=("h.{i}.self_attention.query_key_value",),
    attn_out="h.{i}.self_attention.dense",
    mlp_norm="h.{i}.post_attention_layernorm",
    mlp_up=("h.{i}.mlp.dense_h_to_4h",),
    mlp_down="h.{i}.mlp.dense_4h_to_h",
)

TRAINED_CONTEXT = 2048
"""ALiBi sets no limit; this is what the BLOOM models saw."""


def from_config(config: HFConfig) -> DecoderConfig:
    """See `decoder_config.decoder_config`."""
    read = ConfigReader(config)
    hidden = read.integer("n_embed", "hidden_size")  # transformers' order of preference
    heads = read.integer("num_attention_heads", "n_head")
    if hidden % heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size {hidden} is no multiple of n_head {heads}"
        )
    read.only("n_inner", 4 * hidden)
    return DecoderConfig(
        family="bloom",
        num_layers=read.integer("num_hidden_layers", "n_layer", at_most=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=4 * hidden,
        vocab_size=read.integer("vocab_size"),
        max_position=read.integer("seq_length", "max_position_embeddings", default=TRAINED_CONTEXT),
        position=Position.ALIBI,
        norm=Norm.LAYER,
        norm_eps=read.number("layer_norm_epsilon", 1e-5),
        embedding_norm=True,
        residual_from_norm=read.flag("apply_residual_connection_post_layernorm", False),
        activation=Activation.GELU_TANH,
        fused_qkv_by_head=True,
        embedding_size=hidden,
        tied_head=read.flag("tie_word_embeddings", True),
        eos_token_ids=read.eos_token_ids(),
        bos_token_id=read.bos_token_id(),
        names=NAMES,
    )

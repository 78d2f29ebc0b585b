"""OPT: learned positions with an offset of 2, LayerNorm, ReLU; OPT-350m projects its embedding and
normalises after the residual."""

from __future__ import annotations

from tightfit.workers.decoder_config import (
    MAX_LAYERS,
    ConfigReader,
    DecoderConfig,
    HFConfig,
    Norm,
    Position,
    TensorNames,
)
from tightfit.workers.errors import UnsupportedModelError

NAMES = TensorNames(
    prefixes=("model.decoder.", "decoder."),
    embedding="embed_tokens",
    position="embed_positions",
    project_in="project_in",
    project_out="project_out",
    final_norm="final_layer_norm",
    attn_norm="layers.{i}.self_attn_layer_norm",
    qkv=(
        "layers.{i}.self_attn.q_proj",
        "layers.{i}.self_attn.k_proj",
        "layers.{i}.self_attn.v_proj",
    ),
    attn_out="layers.{i}.self_attn.out_proj",
    mlp_norm="layers.{i}.final_layer_norm",
    mlp_up=("layers.{i}.fc1",),
    mlp_down="layers.{i}.fc2",
)

POSITION_OFFSET = 2
"""OPT's position table starts with two rows that positions never reach
(OPTLearnedPositionalEmbedding)."""


def from_config(config: HFConfig) -> DecoderConfig:
    """See `decoder_config.decoder_config`."""
    read = ConfigReader(config)
    hidden = read.integer("hidden_size")
    heads = read.integer("num_attention_heads")
    if hidden % heads:
        raise UnsupportedModelError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}"
        )
    bias = read.flag("enable_bias", True)
    max_position = read.integer("max_position_embeddings")
    pre_norm = read.flag("do_layer_norm_before", True)
    return DecoderConfig(
        family="opt",
        num_layers=read.integer("num_hidden_layers", at_most=MAX_LAYERS),
        hidden_size=hidden,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=read.integer("ffn_dim"),
        vocab_size=read.integer("vocab_size"),
        max_position=max_position,
        position=Position.LEARNED,
        position_offset=POSITION_OFFSET,
        learned_positions=max_position + POSITION_OFFSET,
        norm=Norm.LAYER,
        norm_eps=1e-5,
        norm_affine=read.flag("layer_norm_elementwise_affine", True),
        pre_norm=pre_norm,
        final_norm=pre_norm and not read.flag("_remove_final_layer_norm", False),
        activation=read.activation("activation_function", "relu"),
        qkv_bias=bias,
        attn_out_bias=bias,
        mlp_bias=bias,
        embedding_size=read.integer("word_embed_proj_dim", default=hidden),
        tied_head=read.flag("tie_word_embeddings", True),
        eos_token_ids=read.eos_token_ids(),
        bos_token_id=read.bos_token_id(),
        names=NAMES,
    )

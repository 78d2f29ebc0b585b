import subprocess
import sys

import pytest

from tightfit.workers.decoder_config import Activation, Norm, Position, decoder_config
from tightfit.workers.errors import UnsupportedModelError

BLOOM = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "n_embed": 14336, "n_layer": 70,
    "n_head": 112, "vocab_size": 250880, "layer_norm_epsilon": 1e-5, "eos_token_id": 2,
    "bos_token_id": 1, "apply_residual_connection_post_layernorm": False,
}  # fmt: skip
OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 1024,
    "num_attention_heads": 16, "num_hidden_layers": 24, "ffn_dim": 4096, "vocab_size": 50272,
    "max_position_embeddings": 2048, "word_embed_proj_dim": 512, "do_layer_norm_before": False,
    "activation_function": "relu", "eos_token_id": 2, "bos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576,
    "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30,
    "intermediate_size": 1536, "vocab_size": 49152, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 100000, "tie_word_embeddings": True, "eos_token_id": [2, 0],
    "hidden_act": "silu",
}  # fmt: skip
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
QWEN2 = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}


def test_bloom_176b_is_read():
    config = decoder_config(BLOOM)
    assert (config.num_layers, config.num_heads, config.head_dim) == (70, 112, 128)
    assert (config.position, config.norm, config.max_position) == (
        Position.ALIBI, Norm.LAYER, 2048,
    )  # fmt: skip
    assert config.tied_head
    assert config.embedding_norm
    assert config.activation is Activation.GELU_TANH


def test_opt_350m_is_projected_and_has_no_final_norm():
    config = decoder_config(OPT)
    assert config.is_projected
    assert not config.pre_norm
    assert not config.final_norm
    assert (config.position_offset, config.learned_positions) == (2, 2050)


def test_smollm2_is_read():
    config = decoder_config(LLAMA)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert config.eos_token_ids == {0, 2}
    assert config.rope is not None
    assert config.rope.theta == 100000
    assert not config.qkv_bias


def test_qwen2_has_biases_on_q_k_and_v_only():
    config = decoder_config(QWEN2)
    assert config.qkv_bias
    assert not config.attn_out_bias
    assert not config.mlp_bias


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0,
                             "original_max_position_embeddings": 4096}},
        {"rope_theta": 500000.0, "rope_scaling": {"type": "llama3", "factor": 8.0,
                             "original_max_position_embeddings": 4096}},
    ],
)  # fmt: skip
def test_old_and_new_names_of_rotary_scaling_mean_the_same(parameters):
    rope = decoder_config({**LLAMA, **parameters}).rope
    assert (rope.kind, rope.theta, rope.factor, rope.original_max_position) == (
        "llama3", 500000.0, 8.0, 4096,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "change", "context"),
    [
        (MISTRAL, {"sliding_window": None}, 8192),
        (MISTRAL, {"sliding_window": 1024}, 1024),
        (MISTRAL, {"sliding_window": 8192}, 8192),
        (MISTRAL, {}, 4096),
        (QWEN2, {"sliding_window": 1024}, 8192),
        (QWEN2, {"sliding_window": 1024, "use_sliding_window": True}, 1024),
        (QWEN2, {"use_sliding_window": True}, 4096),
    ],
)
def test_a_sliding_window_in_effect_limits_the_context_with_a_note(base, change, context):
    config = decoder_config({**base, **change})
    assert config.max_position == context
    assert bool(config.notes) == (context < 8192)


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"model_type": "mamba"}, "model_type is 'mamba'; supported are bloom, llama"),
        (LLAMA, {"model_type": None}, "model_type is None; supported are"),
        (LLAMA, {"model_type": ["llama"]}, r"model_type is \['llama'\]"),
        (LLAMA, {"architectures": ["LlamaForSequenceClassification"]}, "architectures is .*Causal"),
        (LLAMA, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA, {"rope_scaling": {"type": "longrope"}}, "rope_type is 'longrope'; supported are"),
        (LLAMA, {"rope_scaling": {"rope_type": "linear"}}, "'linear' needs a factor"),
        (LLAMA, {"rope_scaling": [1.0]}, r"rope_scaling is \[1.0\], not an object"),
        (LLAMA, {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "x"}}, "mscale is 'x'"),
        (LLAMA, {"rope_theta": float("nan")}, "rope_theta is nan, not a finite number"),
        (LLAMA, {"rope_theta": 0}, "rope_theta is 0, not positive"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.*supported: 1.0"),
        (LLAMA, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
         "partial_rotary_factor is 0.5"),
        (LLAMA, {"sliding_window": 512}, "sliding_window is 512"),
        (LLAMA, {"hidden_act": "relu6"}, "hidden_act is 'relu6'; supported are"),
        (LLAMA, {"hidden_act": ["silu"]}, r"hidden_act is \['silu'\]"),
        (LLAMA, {"num_key_value_heads": 2}, "9 heads do not divide into 2 KV heads"),
        (LLAMA, {"hidden_size": 577}, "hidden_size 577 is no multiple"),
        (LLAMA, {"head_dim": 63}, "head_dim of 63 is odd"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers is 0, not a positive integer"),
        (LLAMA, {"vocab_size": None}, "has no vocab_size"),
        (LLAMA, {"rms_norm_eps": "small"}, "rms_norm_eps is 'small', not a finite number"),
        (LLAMA, {"mlp_bias": "yes"}, "mlp_bias is 'yes', not true or false"),
        (LLAMA, {"eos_token_id": ["</s>"]}, "eos_token_id has '</s>', which is no token id"),
        (LLAMA, {"bos_token_id": -1}, "bos_token_id has -1, which is no token id"),
        (LLAMA, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        (LLAMA, {"num_local_experts": 8}, "num_local_experts is 8"),
        (LLAMA, {"use_qk_norm": True}, "use_qk_norm is True"),
        (MISTRAL, {"sliding_window": "wide"}, "sliding_window is 'wide'"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
        (QWEN2, {"use_sliding_window": 1}, "use_sliding_window is 1, not true or false"),
        (BLOOM, {"n_head": 100}, "hidden_size 14336 is no multiple of n_head 100"),
        (BLOOM, {"n_inner": 1000}, "n_inner is 1000"),
        (OPT, {"num_attention_heads": 15}, "hidden_size 1024 is no multiple"),
        (OPT, {"activation_function": "tanh"}, "activation_function is 'tanh'; supported are"),
    ],
)  # fmt: skip
def test_what_is_not_done_right_is_refused_by_name(base, change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        decoder_config({**base, **change})


@pytest.mark.parametrize("key", ["num_local_experts", "attn_logit_softcapping", "use_qk_norm"])
@pytest.mark.parametrize("value", [None, False])
def test_a_setting_that_is_off_is_not_refused(key, value):
    assert decoder_config({**LLAMA, key: value}) == decoder_config(LLAMA)


def test_reading_a_config_needs_no_torch():
    code = (
        "import sys; from tightfit.workers import shard_bytes; from tightfit.workers.decoder_config"
        f" import decoder_config; decoder_config({LLAMA!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0

"""Stage plans by bytes, for configurations of real models."""

from dataclasses import replace

import pytest

from tightfit.cluster.errors import PlacementError
from tightfit.cluster.planning.memory import (
    DEVICE_CONTEXT_BYTES,
    Reserve,
    model_parts,
    plan_stages,
    stage_bytes,
    usable_bytes,
)
from tightfit.kernels.formats import Format
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.model_formats import Role, Scheme, model_formats

BLOOM_176B = {
    "model_type": "bloom",
    "architectures": ["BloomForCausalLM"],
    "hidden_size": 14336,
    "n_layer": 70,
    "n_head": 112,
    "vocab_size": 250880,
    "layer_norm_epsilon": 1e-5,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
SMOLLM2_135M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
SIZES = {"kv_blocks": 1, "block_size": 16, "max_batch_tokens": 512}


def totals(model, fmt, split):
    return [
        stage_bytes(model, model_formats(model, fmt), first, end, **SIZES).total
        for first, end in split
    ]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
def test_stages_cover_all_layers_and_differ_by_less_than_two_layers_where_layers_are_large(
    num_stages,
):
    model = decoder_config(BLOOM_176B)
    split = plan_stages(model, model_formats(model, "int8"), num_stages=num_stages)
    assert [first for first, _ in split] == [0, *(end for _, end in split[:-1])]
    assert split[-1][1] == 70
    sizes = totals(model, "int8", split)
    layer = stage_bytes(model, model_formats(model, "int8"), 1, 2, **SIZES).weights
    assert max(sizes) - min(sizes) < 2 * layer


def test_the_stage_with_the_wide_embedding_gets_fewer_layers_than_the_stage_in_the_middle():
    split = plan_stages(
        decoder_config(BLOOM_176B), model_formats(decoder_config(BLOOM_176B), "int8"), num_stages=5
    )
    counts = [end - first for first, end in split]
    assert counts[0] < counts[2]
    assert counts[4] < counts[2]


def test_bloom_176b_in_int8_takes_the_bytes_that_the_literature_gives():
    weights = stage_bytes(
        decoder_config(BLOOM_176B),
        model_formats(decoder_config(BLOOM_176B), "int8"),
        0,
        70,
        **SIZES,
    ).weights
    # 172.6 G parameters of layers at one byte, the embedding in 16 bit and the head in 8.
    assert weights == pytest.approx(172.6e9 + 7.2e9 + 3.6e9, rel=0.01)


def test_a_tied_head_is_counted_once_on_a_single_stage():
    model = decoder_config(SMOLLM2_135M)
    one = stage_bytes(model, model_formats(model, "fp32"), 0, 30, **SIZES).weights
    assert one == pytest.approx(134.5e6 * 4, rel=0.01)
    budget = stage_bytes(model, model_formats(model, "fp32"), 0, 30, **SIZES).total
    assert plan_stages(model, model_formats(model, "fp32"), num_stages=1, budget_bytes=budget) == [
        (0, 30)
    ]
    with pytest.raises(PlacementError, match="lacks 1 bytes"):
        plan_stages(model, model_formats(model, "fp32"), num_stages=1, budget_bytes=budget - 1)


def test_every_stage_of_a_plan_keeps_its_budget_with_workspace_and_kv():
    model = decoder_config(SMOLLM2_135M)
    best = max(
        totals(model, "int8", plan_stages(model, model_formats(model, "int8"), num_stages=3))
    )
    split = plan_stages(model, model_formats(model, "int8"), num_stages=3, budget_bytes=best)
    assert max(totals(model, "int8", split)) <= best
    with pytest.raises(PlacementError, match="lacks"):
        plan_stages(model, model_formats(model, "int8"), num_stages=3, budget_bytes=best - 1)


def test_a_budget_below_the_workspace_says_which_setting_to_lower():
    with pytest.raises(PlacementError, match="Lower max_batch_tokens"):
        plan_stages(
            decoder_config(SMOLLM2_135M),
            model_formats(decoder_config(SMOLLM2_135M), "int8"),
            num_stages=2,
            budget_bytes=10 * 2**20,
        )


def test_keys_and_values_in_int8_leave_room_for_nearly_twice_the_tokens_of_bloom_176b():
    model = decoder_config(BLOOM_176B)
    full, small = (
        stage_bytes(model, model_formats(model, "int8", kv=kv), 0, 70, **SIZES).kv_cache
        for kv in ("auto", "int8")
    )
    assert full == 16 * 4_014_080
    assert full / small == 2 * 128 / (128 + 2)


def test_a_plan_with_int8_keys_and_values_fits_where_full_ones_do_not():
    model = decoder_config(SMOLLM2_135M)
    formats = [model_formats(model, "int8", kv=kv) for kv in ("auto", "int8")]
    sizes = {**SIZES, "kv_blocks": 4096}
    full, small = (
        max(
            stage_bytes(model, some, first, end, **sizes).total
            for first, end in plan_stages(model, some, num_stages=2, kv_blocks=4096)
        )
        for some in formats
    )
    assert small < full
    plan_stages(model, formats[1], num_stages=2, kv_blocks=4096, budget_bytes=small)
    with pytest.raises(PlacementError, match="lacks"):
        plan_stages(model, formats[0], num_stages=2, kv_blocks=4096, budget_bytes=small)


def test_an_embedding_on_the_host_gives_the_first_stage_more_layers():
    model = decoder_config(BLOOM_176B)
    host = model_formats(model, "int8", embedding_place="host")
    device = model_formats(model, "int8")
    size = stage_bytes(model, device, 0, 1, **SIZES).weights
    assert size - stage_bytes(model, host, 0, 1, **SIZES).weights == 250_880 * 14_336 * 2
    (_, first), *_ = plan_stages(model, host, num_stages=5)
    (_, before), *_ = plan_stages(model, device, num_stages=5)
    assert first > before


def test_the_tight_reserve_and_a_context_leave_98_percent_less_a_gibibyte():
    total = 80 * 2**30
    usable = usable_bytes(total - DEVICE_CONTEXT_BYTES, total, Reserve.TIGHT, is_gpu=True)
    assert usable == total - total // 50 - 2**30


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_the_parts_of_a_model_in_two_formats_are_those_that_its_stages_count(device, kv):
    model = decoder_config(SMOLLM2_135M)
    less, more = (model_formats(model, fmt, kv=kv, device=device) for fmt in ("int4", "int8"))
    parts, workspaces = model_parts(model, less, more, block_size=16, max_batch_tokens=512), []
    for formats, step in ((less, 0), (more, parts.step)):
        whole = stage_bytes(model, formats, 0, 30, **SIZES)
        middle = stage_bytes(model, formats, 1, 29, **SIZES)
        layers = sum(parts.layers) + 30 * step
        assert whole.weights == layers + parts.embedding + parts.lone_head
        assert middle.weights == layers - 2 * (parts.layers[0] + step)
        assert middle.kv_cache == 28 * parts.kv_block
        workspaces.append(whole.workspace)
    assert parts.workspace == max(workspaces)
    assert parts.step > 0


def test_formats_are_not_mixed_where_layers_of_a_checkpoint_differ():
    model = decoder_config(SMOLLM2_135M)
    formats = model_formats(model, "int4")
    odd = replace(formats, stored=({Role.QKV: Scheme(format=Format.INT8)}, *[{}] * 29))
    with pytest.raises(PlacementError, match="mixed layer by layer only where all layers are al"):
        model_parts(model, odd, model_formats(model, "int8"), block_size=16, max_batch_tokens=512)


@pytest.mark.parametrize("config", [BLOOM_176B, SMOLLM2_135M])
@pytest.mark.parametrize("layers", ["bf16", "int8", "int4"])
def test_what_a_step_reads_by_format_adds_up_to_what_is_held(config, layers):
    model = decoder_config(config)
    held = model_formats(model, layers, device="cuda")
    mixed = replace(
        held,
        stored=tuple(
            {Role.MLP_UP: Scheme(format=Format.INT3)} if i % 2 else {}
            for i in range(model.num_layers)
        ),
    )
    for formats, kinds in ((held, 1), (mixed, 2)):
        parts = model_parts(model, formats, block_size=16, max_batch_tokens=512)
        assert tuple(parts.kinds[kind].total for kind in parts.kind) == parts.layers
        assert len(parts.kinds) == kinds
        assert parts.head_reads.total == parts.head
    assert dict(parts.kinds[1].linears).keys() == {layers, "int3"}

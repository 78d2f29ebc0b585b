"""The decoder's parts, and the ways that a step may take through attention."""

import random

import pytest
import tiny_models
import torch
from shard_chain import BLOCK, BLOCKS, Chain, part, random_tokens
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from tightfit.kernels.formats import KVFormat
from tightfit.workers import batch
from tightfit.workers.checkpoint import open_checkpoint
from tightfit.workers.cpu_ops import CpuNorm
from tightfit.workers.decoder_config import decoder_config
from tightfit.workers.kv_cache import KVCache, gather_rows
from tightfit.workers.positions import alibi_slopes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tiny_models.build(variant, tmp_path_factory.mktemp("m") / variant)
        return made[variant]

    return get


@pytest.mark.parametrize("num_heads", [1, 2, 3, 6, 8, 12, 32, 71, 112])
def test_alibi_slopes_are_those_of_transformers(num_heads):
    theirs = build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(alibi_slopes(num_heads), theirs, atol=0, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("outlier", [1.0, 3000.0])
def test_rms_norm_is_as_exact_as_torchs(models, dtype, rows, outlier):
    config = decoder_config(open_checkpoint(models("llama").path).config)
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, config.hidden_size, generator=generator)
    x[:, 3] *= outlier
    x = x.to(dtype)
    weight = torch.randn(config.hidden_size, generator=generator).to(dtype)
    before = x.clone()
    mine = CpuNorm(config, weight, None)(x)
    assert mine.dtype == dtype
    assert torch.equal(x, before)
    shape, eps = (config.hidden_size,), config.norm_eps
    exact = torch.nn.functional.rms_norm(x.double(), shape, weight.double(), eps)
    theirs = torch.nn.functional.rms_norm(x, shape, weight, eps)
    allowed = 2 * (theirs.double() - exact).abs().max() + 1e-5
    assert (mine.double() - exact).abs().max() <= allowed


def test_what_was_written_is_gathered_and_seen_through_a_window():
    cache = KVCache(
        num_layers=2,
        num_blocks=7,
        block_size=4,
        num_kv_heads=3,
        head_dim=5,
        dtype=torch.float32,
        kv_format=KVFormat.FP32,
    )
    kv = torch.randn(8, 2 * 3 * 5)
    table = [5, 2]
    slots = torch.tensor([table[p // 4] * 4 + p % 4 for p in range(8)])
    cache.write(1, slots, kv)
    rows = gather_rows(torch.tensor([[5, 2], [2, 6]]), num_kv_heads=3, num_blocks=7)
    keys, values = cache.gather(1, rows)
    expected = kv.view(8, 2, 3, 5).permute(1, 2, 0, 3)
    assert torch.equal(keys[:3], expected[0])
    assert torch.equal(values[:3], expected[1])
    assert torch.equal(keys[3:, :4], expected[0][:, 4:])
    assert not keys[3:, 4:].any()
    window_keys, window_values = cache.window(1, 5 * 4, 4)
    assert torch.equal(window_keys[0], expected[0][:, :4])
    assert torch.equal(window_values[0], expected[1][:, :4])
    other_layer, _ = cache.gather(0, rows)
    assert not other_layer.any()


LENGTHS = (3, 20, 33, 90, 17)


def decode_together(chain, tables):
    """Prefill sequences one by one, then one token of each in one micro-batch."""
    texts = [random_tokens(n, seed=n) for n in LENGTHS]
    for i, text in enumerate(texts):
        chain.log_probs([part(i, tables[i], 0, text[:-1])])
    return chain.log_probs(
        [part(i, tables[i], len(text) - 1, text[-1:]) for i, text in enumerate(texts)]
    )


@pytest.mark.parametrize("variant", ["bloom-12-heads", "opt", "llama", "llama-mha-tied"])
@pytest.mark.parametrize("fused_limit", [0, 2**30])
@pytest.mark.parametrize("gather_elements", [1, 2000, 2**30])
def test_every_way_through_attention_gives_the_same(
    models, monkeypatch, variant, fused_limit, gather_elements
):
    monkeypatch.setattr(batch, "FUSED_KEYS_LIMIT", fused_limit)
    monkeypatch.setattr(batch, "GATHER_ELEMENTS", gather_elements)
    model = models(variant)
    ids = list(range(BLOCKS))
    random.Random(1).shuffle(ids)
    tables = [sorted(ids[12 * i : 12 * i + 12], reverse=i % 2 == 0) for i in range(len(LENGTHS))]
    mine = decode_together(Chain(model.path, 1), tables)
    expected = [model.log_probs(random_tokens(n, seed=n))[-1] for n in LENGTHS]
    torch.testing.assert_close(mine, torch.stack(expected), atol=1e-3, rtol=0)


@pytest.mark.parametrize("variant", ["bloom-12-heads", "llama"])
def test_in_fp32_a_sequence_does_not_feel_its_company(models, variant):
    chain = Chain(models(variant).path, 1)
    tables = [list(range(12 * i, 12 * i + 12)) for i in range(len(LENGTHS))]
    together = decode_together(chain, tables)
    for i, n in enumerate(LENGTHS):
        text = random_tokens(n, seed=n)
        alone = chain.log_probs([part(i, tables[i], n - 1, text[-1:])])
        torch.testing.assert_close(alone[0], together[i], atol=2e-5, rtol=0)


@pytest.mark.parametrize("variant", ["bloom", "opt-350m", "llama-head-dim"])
@pytest.mark.parametrize("num_stages", [1, 5])
def test_sequences_that_come_and_go_in_any_chunks_keep_their_own_text(models, variant, num_stages):
    model = models(variant)
    chain = Chain(model.path, num_stages)
    rng = random.Random(num_stages)
    free = list(range(BLOCKS))
    rng.shuffle(free)
    waiting = [random_tokens(rng.randrange(1, 60), seed=100 + i) for i in range(8)]
    expected = [model.log_probs(text) for text in waiting]
    running, next_id = {}, 0
    while running or next_id < len(waiting):
        if next_id < len(waiting) and len(running) < 4:
            running[next_id] = ([], 0)
            next_id += 1
        steps = []
        for i, (table, start) in running.items():
            size = min(rng.choice([1, 1, 3, 13, 31]), len(waiting[i]) - start)
            while len(table) * BLOCK < start + size:
                table.append(free.pop())
            steps.append((i, start, size))
        slices = [part(i, running[i][0], s, waiting[i][s : s + n]) for i, s, n in steps]
        rows = chain.log_probs(slices).split([n for _, _, n in steps])
        for (i, start, size), mine in zip(steps, rows, strict=True):
            wanted = expected[i][start : start + size]
            torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=0)
            table, _ = running.pop(i)
            if start + size < len(waiting[i]):
                running[i] = (table, start + size)
            else:
                free += table
    assert len(free) == BLOCKS

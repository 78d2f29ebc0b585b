"""Keys and values in int8: what they lose, and what they do not touch."""

import math

import pytest
import tiny_models
import torch
from shard_chain import BLOCK, BLOCKS, Chain, part, random_tokens, tables

from tightfit.kernels import reference
from tightfit.kernels.cpu import quantize_kv
from tightfit.kernels.formats import KVFormat
from tightfit.workers.kv_cache import KVCache, gather_rows
from tightfit.workers.model_formats import model_formats
from tightfit.workers.shard_bytes import kv_block_bytes
from tightfit.workers.workspace import workspace_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, NUM_BLOCKS, KV_HEADS, HEAD_DIM = 4, 9, 3, 8
DIVERGENCE_LIMIT = 6e-4
"""Mean Kullback-Leibler divergence of the next token from that with fp32 keys and values, in nats.
The largest seen is half of it; bf16 throughout costs these models up to 16e-4."""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(variant):
        if variant not in made:
            made[variant] = tiny_models.build(variant, tmp_path_factory.mktemp("m") / variant)
        return made[variant]

    return get


def int8_cache(dtype=torch.float32):
    return KVCache(
        num_layers=2, num_blocks=NUM_BLOCKS, block_size=SIZE, num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM, dtype=dtype, kv_format=KVFormat.INT8,
    )  # fmt: skip


def slots(table, count):
    return torch.tensor([table[p // SIZE] * SIZE + p % SIZE for p in range(count)])


def read(cache, table, count):
    """[2, KV heads, count, D]."""
    rows = gather_rows(torch.tensor([table]), num_kv_heads=KV_HEADS, num_blocks=NUM_BLOCKS)
    return torch.stack(cache.gather(1, rows))[:, :, :count]


def random_kv(count, seed):
    """[count, 2 · KV heads · D], heads and tokens of very different size."""
    generator = torch.Generator().manual_seed(seed)
    kv = torch.randn(count, 2, KV_HEADS, HEAD_DIM, generator=generator)
    sizes = 10 ** (4 * torch.rand(count, 2, KV_HEADS, 1, generator=generator) - 2)
    return (kv * sizes).view(count, -1)


def by_head(kv):
    return kv.view(len(kv), 2, KV_HEADS, HEAD_DIM).permute(1, 2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_element_is_off_by_more_than_half_a_scale_of_its_own_head_and_token(dtype):
    kv, table = random_kv(10, seed=0).to(dtype), [7, 2, 5]
    cache = int8_cache(dtype)
    cache.write(1, slots(table, 10), kv)
    mine = read(cache, table, 10)
    assert mine.dtype == dtype
    exact = by_head(kv).double()
    scale = exact.abs().amax(-1, keepdim=True) / 127
    # The scale is rounded to bf16 (2^-8), what is handed back to the dtype.
    allowed = scale / 2 * (1 + 2**-8) + torch.finfo(dtype).eps * exact.abs()
    assert ((mine.double() - exact).abs() <= allowed).all()
    assert (mine.double() - exact).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_quantised_as_the_reference_says(dtype):
    x = torch.randn(6, 40, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    values, scale = quantize_kv(x.transpose(0, 1))
    exact_values, exact_scale = reference.quantize_kv(x.transpose(0, 1))
    assert torch.equal(values, exact_values)
    assert torch.equal(scale, exact_scale)


def test_the_largest_element_of_a_vector_fills_the_integers_and_zeros_stay_zeros():
    x = torch.tensor([[0.0, 0.0], [-3.0, 1.0], [1e-42, 0.0], [3e38, -3e38]])
    values, scale = quantize_kv(x)
    assert values.dtype == torch.int8
    assert scale.dtype == torch.bfloat16
    assert (scale > 0).all()
    assert values.tolist()[:2] == [[0, 0], [-127, 42]]
    assert values[3].tolist() == [127, -127]
    assert (values[2].float() * scale[2].float()).abs().max() <= 1e-38


def test_a_window_and_unscaled_pieces_are_what_is_gathered():
    kv, table = random_kv(8, seed=1), [3, 4]
    cache = int8_cache()
    cache.write(1, slots(table, 8), kv)
    gathered = read(cache, table, 8)
    window = torch.cat(cache.window(1, 3 * SIZE, 8))
    assert torch.equal(window, gathered)
    rows = gather_rows(torch.tensor([table]), num_kv_heads=KV_HEADS, num_blocks=NUM_BLOCKS)
    keys, values, scales = cache.gather_unscaled(1, rows)
    both = torch.stack((keys, values))
    assert torch.equal(both, both.round())
    assert both.abs().max() == 127
    assert torch.equal(both * scales.transpose(2, 3), gathered)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_number_spoils_its_own_head_and_token_and_shows_there(bad):
    kv = random_kv(8, seed=2)
    clean, spoilt = int8_cache(), int8_cache()
    clean.write(1, slots([1, 6], 8), kv)
    kv.view(8, 2, KV_HEADS, HEAD_DIM)[3, 1, 2, 5] = bad
    spoilt.write(1, slots([1, 6], 8), kv)
    before, after = read(clean, [1, 6], 8), read(spoilt, [1, 6], 8)
    assert not after[1, 2, 3].isfinite().any()
    after[1, 2, 3] = before[1, 2, 3]
    assert torch.equal(after, before)


def test_blocks_that_another_sequence_had_hold_only_what_is_new():
    used, fresh = int8_cache(), int8_cache()
    used.write(1, slots([2, 8], 8), random_kv(8, seed=3) * 1000)
    for cache in (used, fresh):
        cache.write(1, slots([8, 2], 8), random_kv(8, seed=4))
    assert torch.equal(read(used, [8, 2], 8), read(fresh, [8, 2], 8))


def run(chain, table, text, chunks):
    """Log-probabilities after every token, the text taken in `chunks`."""
    rows, start = [], 0
    for size in chunks:
        rows.append(chain.log_probs([part(0, table, start, text[start : start + size])]))
        start += size
    return torch.cat(rows)


CHUNKS = (33, 27, *[1] * 40)
VARIANTS = ["bloom", "bloom-12-heads", "opt", "llama", "llama-mha-tied"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("first_block", [None, 9], ids=["scattered", "in a row"])
def test_attention_on_int8_stays_close_to_attention_on_full_keys_and_values(
    models, variant, first_block
):
    model, text = models(variant), random_tokens(100, seed=6)
    table = tables()[0] if first_block is None else list(range(first_block, first_block + 21))
    full, small = (
        run(Chain(model.path, 2, kv_format=kv), table, text, CHUNKS) for kv in ("auto", "int8")
    )
    divergence = (full.exp() * (full - small)).sum(-1)
    assert 0 < divergence.mean() < DIVERGENCE_LIMIT
    sure = full.topk(2).values.diff().abs().flatten() > 0.2
    assert sure.sum() > 10
    assert torch.equal(full.argmax(-1)[sure], small.argmax(-1)[sure])


@pytest.mark.parametrize("variant", VARIANTS)
def test_decodes_in_one_batch_are_as_close(models, variant):
    model, lengths = models(variant), (40, 9, 130)
    texts = [random_tokens(n, seed=n) for n in lengths]
    results = []
    for kv in ("auto", "int8"):
        chain, own = Chain(model.path, 1, kv_format=kv), tables(3)
        for i, text in enumerate(texts):
            chain.log_probs([part(i, own[i], 0, text[:-1])])
        last = [part(i, own[i], len(text) - 1, text[-1:]) for i, text in enumerate(texts)]
        results.append(chain.log_probs(last))
    full, small = results
    divergence = (full.exp() * (full - small)).sum(-1)
    assert 0 < divergence.mean() < DIVERGENCE_LIMIT


@pytest.mark.parametrize("variant", ["bloom", "opt", "llama"])
def test_a_sequence_computed_again_in_blocks_that_others_used_has_the_same_bits(models, variant):
    chain, text = Chain(models(variant).path, 1, kv_format="int8"), random_tokens(100, seed=7)
    first, second, other = tables(5)
    before = run(chain, first, text, CHUNKS)
    for table in (first, second):
        run(chain, table, random_tokens(200, seed=8), (200,))
    assert torch.equal(run(chain, second, text, CHUNKS), before)
    assert torch.equal(run(chain, other, text, CHUNKS), before)


@pytest.mark.parametrize("fmt", ["fp32", "int8"])
@pytest.mark.parametrize("variant", ["bloom", "llama", "llama-head-dim"])
def test_predicted_bytes_are_the_bytes_held(models, variant, fmt):
    for shard in Chain(models(variant).path, 2, fmt, kv_format="int8").shards:
        config, layers = shard.config, len(shard.layers)
        formats = model_formats(config, fmt, kv="int8")
        assert shard.formats == formats
        assert shard.kv_cache_bytes == BLOCKS * kv_block_bytes(config, formats, layers, BLOCK)
        per_head = 2 * config.num_kv_heads * BLOCK * layers
        assert kv_block_bytes(config, formats, layers, BLOCK) == per_head * (config.head_dim + 2)


def test_the_workspace_counts_the_widened_copies(models):
    config = Chain(models("llama").path, 1).config
    full, small = (
        workspace_bytes(config, model_formats(config, kv=kv), 64) for kv in ("auto", "int8")
    )
    assert small > full

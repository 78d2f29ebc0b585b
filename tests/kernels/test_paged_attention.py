"""Attention over the paged cache against fp64, by flash-attention's rule: our error is at most
twice that of plain torch in the same dtype."""

from dataclasses import dataclass

import pytest
import torch

from tightfit.kernels import paged_attention as module
from tightfit.kernels import reference
from tightfit.kernels.attention_plan import QUERIES_PER_TILE, FixedSizes, plan_attention
from tightfit.kernels.paged_attention import choose_tile, paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
CACHES = ["16-bit", "int8"]

HEADS = ((2, 2), (6, 2))
"""(H, H_kv): a KV head for each head, and groups of three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch with a cache: what both implementations are given."""

    query: torch.Tensor
    cache: torch.Tensor
    scales: torch.Tensor | None
    slopes: torch.Tensor | None
    tables: list[list[int]]
    counts: list[int]
    contexts: list[int]
    num_kv_heads: int
    head_dim: int
    block_size: int

    @property
    def sizes(self):
        return {
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "softmax_scale": self.head_dim**-0.5,
        }

    @property
    def plan(self):
        return plan_attention(
            self.tables, self.counts, self.contexts, block_size=self.block_size, device=DEVICE
        )

    @property
    def slots(self):
        """Those that some sequence's context fills."""
        size = self.block_size
        return [
            table[p // size] * size + p % size
            for table, context in zip(self.tables, self.contexts, strict=True)
            for p in range(context)
        ]


def _batch(
    counts,
    contexts,
    *,
    heads=(2, 2),
    head_dim=64,
    block_size=16,
    cache="16-bit",
    has_slopes=False,
    dtype=torch.float16,
):
    """Blocks are scrambled, and whatever no context fills is NaN, or NaN in scale."""
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads = heads
    needed = [-(-context // block_size) for context in contexts]
    blocks = torch.randperm(sum(needed) + 2, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(count)] for count in needed]
    shape = (2 * num_kv_heads, (sum(needed) + 2) * block_size, head_dim)
    kv = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    query = torch.randn(sum(counts), num_heads * head_dim, generator=generator).to(DEVICE, dtype)
    slopes = torch.linspace(0.5, 0.004, num_heads, device=DEVICE) if has_slopes else None
    values, scales = reference.quantize_kv(kv) if cache == "int8" else (kv, None)
    batch = Batch(
        query=query, cache=values, scales=scales, slopes=slopes, tables=tables, counts=counts,
        contexts=contexts, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size,
    )  # fmt: skip
    unfilled = torch.ones(shape[1], dtype=torch.bool, device=DEVICE)
    unfilled[batch.slots] = False
    if scales is None:
        values[:, unfilled] = float("nan")
    else:
        scales[:, unfilled] = float("nan")
    return batch


def _attend(batch, plan=None, **options):
    return paged_attention(
        batch.query, batch.cache, batch.scales, plan or batch.plan, **batch.sizes,
        slopes=batch.slopes, **options,
    )  # fmt: skip


def _reference(batch, dtype):
    wide = dtype is torch.float64
    return reference.paged_attention(
        batch.query.to(dtype), batch.cache.double() if wide else batch.cache,
        batch.scales, batch.tables, batch.counts, batch.contexts, **batch.sizes,
        slopes=batch.slopes,
    )  # fmt: skip


def _assert_as_good_as_torch(out, batch):
    """Half a unit in the last place of the largest result counts as plain torch's error in any
    case: with few results it may be spared that by luck."""
    exact = _reference(batch, torch.float64)
    plain = _reference(batch, batch.query.dtype).double()
    half_unit = exact.abs().max() * torch.finfo(out.dtype).eps / 2
    allowed = 2 * torch.maximum((plain - exact).abs().max(), half_unit) + 1e-5
    assert out.dtype == batch.query.dtype
    assert out.shape == exact.shape
    assert bool(torch.isfinite(exact).all())
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_decodes_are_as_exact_as_plain_torch(heads, has_slopes, cache, dtype):
    contexts = [1, 16, 17, 75, 130]
    batch = _batch([1] * 5, contexts, heads=heads, cache=cache, has_slopes=has_slopes, dtype=dtype)
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_chunks_are_as_exact_as_plain_torch(heads, has_slopes, cache, dtype):
    counts, contexts = [2, 70, 33], [2, 70, 90]  # from the start, over a tile, and continued
    batch = _batch(counts, contexts, heads=heads, cache=cache, has_slopes=has_slopes, dtype=dtype)
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("heads", [*HEADS, (4, 1), (20, 1)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128])
def test_all_sizes_of_heads_and_groups_attend_in_a_mixed_batch(head_dim, heads, cache, dtype):
    batch = _batch(
        [1, 5, 1, 17], [40, 5, 33, 50], heads=heads, head_dim=head_dim, cache=cache, dtype=dtype
    )
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64])
@pytest.mark.parametrize("heads", HEADS)
def test_blocks_may_be_smaller_or_larger_than_a_step(heads, block_size):
    batch = _batch([1, 20, 1], [70, 65, 3], heads=heads, block_size=block_size)
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("heads", HEADS)
def test_splits_of_the_context_combine_and_give_the_same_bits_again(heads, cache, dtype):
    contexts = [800, 9, 400]  # the short one leaves splits without keys
    assert choose_tile(3, max(contexts), *heads, tensor_cores=True).splits > 4
    batch = _batch([1, 1, 1], contexts, heads=heads, cache=cache, dtype=dtype)
    out = _attend(batch)
    _assert_as_good_as_torch(out, batch)
    assert torch.equal(out, _attend(batch))


def test_more_splits_than_are_combined_at_a_time_combine(monkeypatch):
    monkeypatch.setattr(module, "COMBINE_BLOCK", 4)
    batch = _batch([1], [700], has_slopes=True)
    assert choose_tile(1, 700, 2, 2, tensor_cores=True).splits > 4
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("heads", HEADS)
def test_few_decodes_that_fill_the_device_are_not_split(heads, monkeypatch):
    monkeypatch.setattr(module, "MIN_PROGRAMS", {"sums": 1, "grouped": 1})
    monkeypatch.setattr(module, "_combine_kernel", None)
    batch = _batch([1, 1], [150, 64], heads=heads, has_slopes=True)
    _assert_as_good_as_torch(_attend(batch), batch)


def test_the_same_chunk_gives_the_same_bits_again():
    batch = _batch([70, 1], [90, 30])
    assert torch.equal(_attend(batch), _attend(batch))


@pytest.mark.parametrize("capability", [70, 75])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("has_slopes", [False, True])
@pytest.mark.parametrize("heads", HEADS)
def test_devices_without_tensor_cores_are_as_exact(
    heads, has_slopes, cache, capability, monkeypatch
):
    monkeypatch.setattr(module, "_grouped_kernel", None)  # needs tensor cores
    monkeypatch.setattr(module, "attend_chunks", None)
    batch = _batch([1, 20, 1, 4], [140, 50, 3, 4], heads=heads, cache=cache, has_slopes=has_slopes)
    _assert_as_good_as_torch(_attend(batch, capability=capability), batch)


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")  # numpy's
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["query", "keys", "values"])
@pytest.mark.parametrize("heads", HEADS)
def test_a_sequence_that_is_not_finite_does_not_spoil_its_neighbours(heads, where, bad):
    batch = _batch([1, 1, 5, 5, 1], [40, 150, 20, 9, 12], heads=heads)
    clean = _attend(batch)
    spoilt = {1: slice(1, 2), 2: slice(2, 7)}
    for sequence, rows in spoilt.items():
        slot = batch.tables[sequence][0] * batch.block_size + 3
        if where == "query":
            batch.query[rows, 5] = bad
        elif where == "keys":
            batch.cache[: heads[1], slot, 5] = bad
        else:
            batch.cache[heads[1] :, slot, 5] = bad
    out = _attend(batch)
    kept = torch.ones(len(out), dtype=torch.bool)
    for rows in spoilt.values():
        kept[rows] = False
        if bad != bad or where != "keys":  # an infinite key may also just be far from the query
            assert bool((~torch.isfinite(out[rows])).any(dim=1).all())
    assert torch.equal(out[kept], clean[kept])


@pytest.mark.parametrize("heads", HEADS)
def test_large_scores_do_not_overflow(heads):
    batch = _batch([1, 3], [70, 40], heads=heads)
    batch.query.mul_(200)
    _assert_as_good_as_torch(_attend(batch), batch)


@pytest.mark.parametrize("heads", HEADS)
def test_the_query_may_be_a_slice_of_wider_rows(heads):
    batch = _batch([1, 9], [20, 30], heads=heads)
    width = batch.query.shape[1]
    wide = torch.full((10, 2 * width + 32), float("nan"), dtype=torch.float16, device=DEVICE)
    wide[:, 16 : 16 + width] = batch.query
    plan = batch.plan
    out = paged_attention(wide[:, 16 : 16 + width], batch.cache, None, plan, **batch.sizes)
    assert torch.equal(out, _attend(batch))
    turned = batch.query.t().contiguous().t()
    assert torch.equal(paged_attention(turned, batch.cache, None, plan, **batch.sizes), out)


@pytest.mark.parametrize("heads", HEADS)
def test_a_plan_of_fixed_sizes_takes_other_sequences_in_place_and_pads_with_zeros(heads):
    batch = _batch([1, 1, 1], [150, 20, 64], heads=heads)
    fixed = FixedSizes(num_tokens=4, max_context=200)

    def plan_of(index):
        return plan_attention(
            [batch.tables[i] for i in index], [1] * len(index), [batch.contexts[i] for i in index],
            block_size=16, device=DEVICE, fixed=fixed,
        )  # fmt: skip

    def attend(plan, index):
        query = torch.zeros(4, batch.query.shape[1], dtype=torch.float16, device=DEVICE)
        query[: len(index)] = batch.query[index]
        return paged_attention(query, batch.cache, None, plan, **batch.sizes)

    plan = plan_of([1])
    attend(plan, [1])
    plan.refill(plan_of([2, 0, 1]))
    out = attend(plan, [2, 0, 1])
    exact = _reference(batch, torch.float64)
    assert (out[:3].double() - exact[[2, 0, 1]]).abs().max() < 2e-3
    assert torch.equal(out[3], torch.zeros_like(out[3]))
    plan.refill(plan_of([0]))
    assert torch.equal(attend(plan, [0])[1:], torch.zeros_like(out[1:]))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS)
def test_a_captured_graph_attends_by_a_refilled_plan(heads):
    batch = _batch([1, 1, 1], [150, 20, 64], heads=heads, cache="int8")
    fixed = FixedSizes(num_tokens=3, max_context=200)
    plans = [
        plan_attention(
            tables, [1] * 3, contexts, block_size=16, device=DEVICE, fixed=fixed
        )
        for tables, contexts in (
            ([batch.tables[0]] * 3, [5, 6, 7]), (batch.tables, batch.contexts),
        )
    ]  # fmt: skip
    expected = _attend(batch, plans[1])
    plan = plan_attention([], [], [], block_size=16, device=DEVICE, fixed=fixed)
    plan.refill(plans[0])
    _attend(batch, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _attend(batch, plan)
    plan.refill(plans[1])
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 40])
def test_slots_past_two_to_the_31_elements_are_found(count):
    num_slots = 2**24 + 64
    cache = torch.zeros((2, num_slots, 128), dtype=torch.float16, device=DEVICE)
    block = num_slots // 16 - 1
    cache[1, block * 16 :] = 3.0
    plan = plan_attention([[0, 1, block]], [count], [48], block_size=16, device=DEVICE)
    query = torch.zeros((count, 128), dtype=torch.float16, device=DEVICE)
    out = paged_attention(
        query, cache, None, plan, num_kv_heads=1, head_dim=128, block_size=16, softmax_scale=1.0
    )
    assert torch.equal(out[-1], torch.ones_like(out[-1]))


@pytest.mark.parametrize("num_decodes", [1, 7, 64])
@pytest.mark.parametrize("heads", [(112, 112), (64, 8), (32, 1)])
@pytest.mark.parametrize("max_context", [1, 63, 2048, 100_000])
def test_contexts_are_split_until_the_device_is_busy_but_not_into_crumbs(
    num_decodes, heads, max_context
):
    tile = choose_tile(num_decodes, max_context, *heads, tensor_cores=True)
    assert tile.splits >= 1
    if tile.splits > 1:
        assert tile.splits * module.MIN_KEYS_PER_SPLIT <= max_context
        kind = "sums" if tile.block_g == 1 else "grouped"
        assert tile.splits * num_decodes * heads[1] <= module.MIN_PROGRAMS[kind]


def test_a_plan_puts_decodes_first_and_tiles_with_most_keys_before_others():
    plan = plan_attention(
        [[3], [4, 5], [6], [7]], [2, 1, 1, 4], [4, 20, 9, 16], block_size=16, device=DEVICE
    )
    assert plan.num_tokens == 8
    assert plan.num_decodes == 2
    assert plan.max_context == 20
    assert plan.rows.tolist() == [2, 3, 0, 4]
    assert plan.counts.tolist() == [1, 1, 2, 4]
    assert plan.contexts.tolist() == [20, 9, 4, 16]
    assert plan.tables.tolist() == [[4, 5], [6, 0], [3, 0], [7, 0]]
    assert plan.tiles.tolist() == [[3, 0], [2, 0]]
    assert [chunk.row for chunk in plan.chunks] == [0, 4]


def test_a_long_chunk_has_a_tile_for_every_query_token():
    count = 2 * QUERIES_PER_TILE + 1
    plan = plan_attention([range(20)], [count], [300], block_size=16, device=DEVICE)
    assert plan.tiles.tolist() == [[0, 2 * QUERIES_PER_TILE], [0, QUERIES_PER_TILE], [0, 0]]


def test_plans_that_make_no_sense_are_refused():
    def plan(*args, **options):
        return plan_attention(*args, block_size=16, device=DEVICE, **options)

    with pytest.raises(ValueError, match=r"same sequences, got 1, 2 and 1"):
        plan([[0]], [1, 1], [1])
    with pytest.raises(ValueError, match=r"sequence 1: 1 query tokens at the end of 17 and 1 bl"):
        plan([[0], [1]], [1, 1], [1, 17])
    with pytest.raises(ValueError, match=r"sequence 0: 5 query tokens at the end of 4"):
        plan([[0]], [5], [4])
    with pytest.raises(ValueError, match=r"sequence 0: 0 query tokens"):
        plan([[0]], [0], [4])
    fixed = FixedSizes(num_tokens=2, max_context=32)
    for counts, contexts in (([2], [4]), ([1, 1, 1], [4, 4, 4]), ([1], [33])):
        with pytest.raises(ValueError, match=r"do not fit a plan of 2 decodes with 32"):
            plan([[0, 1, 2]] * len(counts), counts, contexts, fixed=fixed)
    with pytest.raises(ValueError, match=r"build both with the same fixed sizes"):
        plan([[0]], [1], [4], fixed=fixed).refill(plan([[0]], [1], [4]))
    with pytest.raises(ValueError, match=r"1 chunks cannot take"):
        plan([[0]], [2], [4]).refill(plan([[0]], [2], [4]))


def test_what_does_not_fit_is_refused():
    batch = _batch([1], [20])
    plan, sizes = batch.plan, batch.sizes

    def attend(query=batch.query, cache=batch.cache, scales=None, slopes=None, **changed):
        return paged_attention(query, cache, scales, plan, slopes=slopes, **(sizes | changed))

    with pytest.raises(ValueError, match=r"query must be \[1, .*2 KV heads · 64\].*float32"):
        attend(query=batch.query.float())
    with pytest.raises(ValueError, match=r"got \[2, 128\]"):
        attend(query=batch.query.expand(2, -1))
    with pytest.raises(ValueError, match=r"head_dim must be 16, 32, … or 128, got 8"):
        attend(head_dim=8)
    with pytest.raises(ValueError, match=r"head_dim .* got 144"):
        attend(head_dim=144)
    with pytest.raises(ValueError, match=r"block_size must be one of .* got 12"):
        attend(block_size=12)
    with pytest.raises(ValueError, match=r"no whole blocks of 64"):
        attend(cache=batch.cache[:, :48].contiguous(), block_size=64)
    with pytest.raises(ValueError, match=r"cache must be \[4, slots, 64\].*torch.int8.*no scales"):
        attend(cache=batch.cache.to(torch.int8))
    with pytest.raises(ValueError, match=r"cache must be .* strides"):
        attend(cache=batch.cache[:, ::2])
    scales = torch.ones(batch.cache.shape[:2], dtype=torch.float32, device=DEVICE)
    with pytest.raises(ValueError, match=r"scales must be .* bfloat16.*got .* torch.float32"):
        attend(cache=batch.cache.to(torch.int8), scales=scales)
    with pytest.raises(ValueError, match=r"slopes must be \[2\] float32.*got \[3\]"):
        attend(slopes=torch.ones(3, device=DEVICE))

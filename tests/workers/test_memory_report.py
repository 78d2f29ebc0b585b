"""What a stage's bytes are said to be."""

import pytest

from tightfit.workers.api import RUNTIME_BYTES, StageMemory

GB = 10**9


def memory(**changes):
    fields = {
        "predicted_weight_bytes": 10 * GB, "weight_bytes": 10 * GB,
        "predicted_kv_cache_bytes": 2 * GB, "kv_cache_bytes": 2 * GB, "workspace_bytes": GB,
        "measured_workspace_bytes": GB // 2, "rss_anon_bytes": 12 * GB,
        "loaded_rss_bytes": 12 * GB, "budget_bytes": 14 * GB, "num_kv_blocks": 100,
    }  # fmt: skip
    return StageMemory(**{**fields, **changes})


def test_headroom_is_what_the_budget_leaves_beside_what_is_held_and_a_step():
    assert memory().headroom_bytes == GB
    assert memory(budget_bytes=None).headroom_bytes is None
    assert memory(budget_bytes=12 * GB).headroom_bytes == -GB
    assert memory().kv_tokens == 1600


def test_a_widened_embedding_on_the_host_counts_on_a_cpu_and_not_on_a_gpu():
    host = {"predicted_host_bytes": GB, "host_bytes": GB}
    assert memory(**host).headroom_bytes == 0
    on_gpu = memory(**host, loaded_gpu_bytes=12 * GB, loaded_rss_bytes=GB)
    assert (on_gpu.headroom_bytes, on_gpu.resident_bytes) == (GB, 12 * GB)
    assert on_gpu.differences == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"weight_bytes": 10 * GB + 239 * 10**6}, []),
        ({"weight_bytes": 10 * GB + 241 * 10**6}, ["tensors: 12,241,000,000 bytes, 12,000"]),
        ({"loaded_rss_bytes": 12 * GB - 239 * 10**6}, []),
        ({"loaded_rss_bytes": 12 * GB - 241 * 10**6}, ["device memory: 11,759,000,000 bytes, "]),
        ({"measured_workspace_bytes": GB + 1}, ["workspace: 1,000,000,001 bytes, 1,000,000,000"]),
        ({"measured_workspace_bytes": None}, []),
    ],
)
def test_what_differs_by_more_than_2_percent_is_said(changes, said):
    found = memory(**changes).differences
    assert len(found) == len(said)
    assert all(line.startswith(start) for line, start in zip(found, said, strict=True))


def test_a_small_stages_process_may_take_what_any_process_does_and_its_tensors_may_not():
    small = {"predicted_weight_bytes": 10**6, "weight_bytes": 10**6}
    sizes = {**small, "predicted_kv_cache_bytes": 0, "kv_cache_bytes": 0}
    assert memory(**sizes, loaded_rss_bytes=RUNTIME_BYTES).differences == ()
    assert len(memory(**sizes, loaded_rss_bytes=RUNTIME_BYTES + 2 * 10**6).differences) == 1
    assert len(memory(**{**sizes, "weight_bytes": 2 * 10**6}, loaded_rss_bytes=0).differences) == 1

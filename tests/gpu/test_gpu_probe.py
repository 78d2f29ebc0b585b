"""The probe of real GPUs."""

import pytest
import torch

from tightfit.workers.probe import probe_node
from tightfit.workers.probing.cache import ProbeCache

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def test_every_gpu_has_rates_and_links_and_gives_its_memory_back(tmp_path):
    found = probe_node("cuda", ProbeCache(tmp_path))
    count = torch.cuda.device_count()
    assert found.notes == ()
    assert len(found.devices) == count
    assert len(found.links) == 2 * count + count * (count - 1)
    for device in found.devices:
        assert device.uuid
        assert 0 < device.memory.free_bytes <= device.memory.total_bytes
        assert all(linear.ops_per_s > 0 for linear in device.rates.linears)
        # A read cannot be faster than 100 TB/s: the clock did not wait for the kernel.
        assert 1e9 < device.rates.read_bytes_per_s < 1e14
    assert torch.cuda.memory_reserved() < 2**20 * 64
    again = probe_node("cuda", ProbeCache(tmp_path))
    assert all(device.is_cached for device in again.devices)

"""What is looked at right before stages are placed."""

import subprocess
import sys
import types

import pytest
import torch

from tightfit.workers.errors import ProbeError
from tightfit.workers.probing import cuda
from tightfit.workers.probing.host import host_memory
from tightfit.workers.probing.present import present_devices
from tightfit.workers.probing.result import DeviceMemory


def test_a_host_is_one_device_with_what_is_free_of_it():
    (found,) = present_devices(frozenset({"cpu"}))
    assert (found.device, found.kind, found.uuid) == ("cpu", "cpu", None)
    assert found.total_bytes == host_memory().total_bytes
    assert 0 < found.free_bytes <= found.total_bytes


def test_looking_at_a_host_imports_no_torch():
    code = (
        "import sys; from tightfit.workers.node_tasks import present_on_this_node as look;"
        "look(frozenset({'cpu'}), frozenset()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs, of which the second cannot be used."""

    def memory(index):
        if index == 1:
            raise ProbeError("cuda:1 cannot be used")
        return DeviceMemory(total_bytes=100, free_bytes=90 - index, bound_by="mem_get_info")

    monkeypatch.setattr(cuda, "cuda_problem", lambda: None)
    monkeypatch.setattr(cuda, "gpu_memory", memory)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: types.SimpleNamespace(uuid=f"u{i}")
    )


def test_a_gpu_that_cannot_be_used_is_missing_and_the_others_keep_their_numbers(gpus):
    found = present_devices(frozenset({"gpu"}))
    assert [(d.device, d.uuid, d.free_bytes) for d in found] == [
        ("cuda:0", "u0", 90), ("cuda:2", "u2", 88),
    ]  # fmt: skip


def test_gpus_that_stages_hold_are_left_alone(gpus):
    found = present_devices(frozenset({"gpu"}), held=frozenset({"u0"}))
    assert [d.uuid for d in found] == ["u2"]


def test_where_there_is_no_gpu_there_is_none(monkeypatch):
    monkeypatch.setattr(cuda, "cuda_problem", lambda: "no driver")
    assert present_devices(frozenset({"gpu"})) == ()

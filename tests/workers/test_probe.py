"""The probe on this machine's CPU, and what it makes of GPUs, which stand-ins play."""

import math
import time
import types

import pytest
import torch
import yaml

from tightfit.kernels.formats import Format
from tightfit.workers.errors import ProbeError
from tightfit.workers.probe import probe_node
from tightfit.workers.probing import cuda
from tightfit.workers.probing.cache import ProbeCache
from tightfit.workers.probing.loopback import measure_loopback
from tightfit.workers.probing.rates import DENSE_FORMATS, FEW_TOKENS, FORMATS, measure_rates
from tightfit.workers.probing.result import (
    DeviceMemory,
    DeviceRates,
    LinearRate,
    LinkRate,
    dump_probe,
    parse_probe,
)

CPU = torch.device("cpu")
ROOM = 2**27
"""Enough for the smallest layer, so that tests are short."""


def small_rates(device=CPU, free=ROOM, dense_tokens=128, limit_s=0.0):
    return measure_rates(
        device, free, widths=(1024, 512, 256), dense_tokens=dense_tokens, limit_s=limit_s
    )


def is_rate(value):
    return math.isfinite(value) and value > 0


# -- rates -----------------------------------------------------------------------------------


def test_every_format_has_a_finite_rate_at_one_token_and_at_64():
    rates = small_rates()
    assert is_rate(rates.read_bytes_per_s)
    assert is_rate(rates.copy_bytes_per_s)
    seen = {(linear.format, linear.tokens) for linear in rates.linears}
    assert seen == {(fmt, tokens) for fmt in FORMATS for tokens in FEW_TOKENS} | {
        (fmt, 128) for fmt in DENSE_FORMATS
    }
    for linear in rates.linears:
        assert is_rate(linear.ops_per_s)
        assert is_rate(linear.bytes_per_s)


def test_formats_of_fewer_bits_are_measured_with_fewer_bytes():
    sizes = {linear.format: linear.weight_bytes for linear in small_rates().linears}
    assert sizes[Format.INT3] < sizes[Format.INT4] < sizes[Format.INT8] < sizes[Format.BF16]


def test_layers_are_as_wide_as_memory_and_time_allow():
    widths = {
        (free, limit_s): small_rates(free=free, limit_s=limit_s).linears[-1].width
        for free in (ROOM, ROOM // 4)
        for limit_s in (0.0, 60.0)
    }
    assert widths == {
        (ROOM, 60.0): 1024,
        (ROOM, 0.0): 512,
        (ROOM // 4, 60.0): 512,
        (ROOM // 4, 0.0): 256,
    }


def test_too_little_memory_for_any_layer_is_refused_with_what_it_takes():
    with pytest.raises(ProbeError, match=r"cpu has 1,000 bytes free, .* takes 8,388,608"):
        small_rates(free=1000)


def test_the_number_of_threads_of_torch_is_as_before(cpu_probe):
    assert torch.get_num_threads() == cpu_probe.threads_before


def test_the_best_rate_of_a_format_is_its_fastest_and_a_missing_format_is_named():
    linears = [
        LinearRate(format=Format.INT4, tokens=t, width=8, weight_bytes=32, seconds=1.0)
        for t in (1, 64)
    ]
    rates = DeviceRates(read_bytes_per_s=1.0, copy_bytes_per_s=1.0, linears=tuple(linears))
    assert rates.best(Format.INT4).tokens == 64
    assert rates.best(Format.INT4).ops_per_s == 2 * 64 * 8 * 8
    with pytest.raises(ProbeError, match="no rate for int3"):
        rates.best(Format.INT3)


def test_the_loopback_link_carries_small_and_large_messages():
    link = measure_loopback()
    assert (link.source, link.target) == ("cpu", "cpu")
    assert is_rate(link.bytes_per_s)
    assert 0 < link.latency_s < 5


# -- this machine's CPU ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def cpu_probe(tmp_path_factory):
    """A small host's probe, made once: {cold, warm, threads_before, directory}."""
    patch = pytest.MonkeyPatch()
    patch.setattr("tightfit.workers.probe.CPU_WIDTHS", (512, 256))
    patch.setattr("tightfit.workers.probe.CPU_LIMIT_S", 0.0)
    directory = tmp_path_factory.mktemp("cache")
    threads = torch.get_num_threads()
    try:
        cold = probe_node("cpu", ProbeCache(directory))
        warm = probe_node("cpu", ProbeCache(directory))
    finally:
        patch.undo()
    return types.SimpleNamespace(cold=cold, warm=warm, threads_before=threads, directory=directory)


def test_a_host_is_one_device_with_memory_rates_and_a_link(cpu_probe):
    (device,), (link,) = cpu_probe.cold.devices, cpu_probe.cold.links
    assert (device.device, device.kind) == ("cpu", "cpu")
    assert device.name
    assert device.cores > 0
    assert 0 < device.memory.free_bytes <= device.memory.total_bytes
    assert not device.is_cached
    assert (link.source, link.target) == ("cpu", "cpu")
    assert cpu_probe.cold.notes == ()
    assert cpu_probe.cold.elapsed_s > 0


def test_the_second_time_rates_come_from_the_cache_and_memory_does_not(cpu_probe, monkeypatch):
    (cold,), (warm,) = cpu_probe.cold.devices, cpu_probe.warm.devices
    assert warm.is_cached
    assert warm.rates == cold.rates
    assert cpu_probe.warm.links == cpu_probe.cold.links
    now = DeviceMemory(total_bytes=10, free_bytes=7, bound_by="test")
    monkeypatch.setattr("tightfit.workers.probe.host_memory", lambda: now)
    (device,) = probe_node("cpu", ProbeCache(cpu_probe.directory)).devices
    assert device.memory == now
    assert device.rates == cold.rates
    for file in cpu_probe.directory.iterdir():
        assert "free_bytes" not in file.read_text()


def test_rates_of_a_host_short_of_memory_are_not_taken_for_those_of_one_with_room(
    monkeypatch, tmp_path
):
    monkeypatch.setattr("tightfit.workers.probe.CPU_WIDTHS", (512, 256))
    free = {"bytes": 2**24}

    def memory():
        return DeviceMemory(total_bytes=2**34, free_bytes=free["bytes"], bound_by="test")

    def look():
        (device,) = probe_node("cpu", ProbeCache(tmp_path)).devices
        return device.is_cached, device.rates.linears[0].width

    monkeypatch.setattr("tightfit.workers.probe.host_memory", memory)
    assert [look(), look()] == [(False, 256), (True, 256)]
    free["bytes"] = 2**33
    assert [look(), look()] == [(False, 512), (True, 512)]
    free["bytes"] = 0  # what is known with room holds also without
    assert look() == (True, 512)


def test_a_full_host_is_listed_without_rates_and_with_the_reason(monkeypatch, tmp_path):
    full = DeviceMemory(total_bytes=2**30, free_bytes=0, bound_by="test")
    monkeypatch.setattr("tightfit.workers.probe.host_memory", lambda: full)
    found = probe_node("cpu", ProbeCache(tmp_path))
    assert found.devices[0].rates is None
    assert "cpu has 0 bytes free" in found.notes[0]


def test_a_result_survives_json_which_is_yaml_too(cpu_probe):
    text = dump_probe(cpu_probe.cold)
    assert parse_probe(text) == cpu_probe.cold
    tree = yaml.safe_load(text)
    rates = cpu_probe.cold.devices[0].rates
    assert tree["devices"][0]["rates"]["read_bytes_per_s"] == rates.read_bytes_per_s


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{}", "not the result of a probe"),
        ("\x00", "not the result of a probe"),
        (None, "version 9"),
    ],
)
def test_what_is_no_result_is_refused(cpu_probe, text, complaint):
    if text is None:
        text = dump_probe(cpu_probe.cold).replace('"version": 1', '"version": 9')
    with pytest.raises(ProbeError, match=complaint):
        parse_probe(text)


@pytest.mark.slow
def test_a_whole_probe_of_this_host_ends_in_bounded_time(tmp_path):
    start_s = time.monotonic()
    found = probe_node("cpu", ProbeCache(tmp_path))
    assert found.elapsed_s <= time.monotonic() - start_s
    assert found.elapsed_s < 60  # some seconds on an idle machine
    assert found.notes == ()
    assert len(found.devices[0].rates.linears) == 12


# -- GPUs ------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_asking_for_gpus_without_cuda_says_what_is_missing(tmp_path):
    with pytest.raises(ProbeError, match="build without CUDA; install one"):
        probe_node("cuda", ProbeCache(tmp_path))


def test_a_driver_that_shows_no_device_is_another_complaint(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ProbeError, match="finds no CUDA device; check nvidia-smi"):
        probe_node("cuda", ProbeCache(tmp_path))


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86 Release", "570.86"),
        ("something else", "unknown"),
        (None, "unknown"),
    ],
)
def test_the_driver_is_read_from_the_kernel_module(tmp_path, line, version):
    if line is not None:
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/version").write_text(f"{line}\nGCC version:  gcc 12\n")
    assert cuda.driver_version(tmp_path) == version


@pytest.fixture
def three_gpus(monkeypatch):
    """cuda:0 idle, cuda:1 full, cuda:2 in exclusive use by another process; rates are made up."""
    free = {0: 20 * 2**30, 1: 2**20}

    def memory(index):
        if index == 2:
            raise ProbeError("cuda:2 cannot be used: all devices are busy")
        return DeviceMemory(total_bytes=24 * 2**30, free_bytes=free[index], bound_by="mem_get_info")

    def rates(index, free_bytes):
        return small_rates() if free_bytes > ROOM else small_rates(free=free_bytes)

    def link(source, target):
        return LinkRate(source=source, target=target, bytes_per_s=1e10, latency_s=1e-5)

    def host_link(index, *, is_upload):
        ends = ("cpu", f"cuda:{index}")
        return link(*(ends if is_upload else reversed(ends)))

    monkeypatch.setattr(cuda, "cuda_problem", lambda: None)
    monkeypatch.setattr(cuda, "gpu_memory", memory)
    monkeypatch.setattr(cuda, "gpu_rates", rates)
    monkeypatch.setattr(cuda, "host_link", host_link)
    monkeypatch.setattr(cuda, "peer_link", lambda a, b: link(f"cuda:{a}", f"cuda:{b}"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda index: types.SimpleNamespace(name="GPU", uuid=f"u{index}", major=9, minor=0),
    )  # fmt: skip


def test_a_full_gpu_is_listed_without_rates_and_a_busy_one_is_noted(three_gpus, tmp_path):
    found = probe_node("cuda", ProbeCache(tmp_path))
    idle, full = found.devices
    assert (idle.device, idle.kind, idle.capability, idle.uuid) == ("cuda:0", "gpu", "9.0", "u0")
    assert idle.rates is not None
    assert full.rates is None
    assert full.memory.free_bytes == 2**20
    assert any("1,048,576 bytes free" in note for note in found.notes)
    assert any("cuda:2 cannot be used" in note for note in found.notes)


def test_links_go_both_ways_to_the_host_and_between_the_gpus_that_can_be_used(three_gpus, tmp_path):
    for _ in range(2):  # measured, and from the cache
        found = probe_node("cuda", ProbeCache(tmp_path))
        ends = {(link.source, link.target) for link in found.links}
        assert ends == {
            ("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:1"), ("cuda:1", "cpu"),
            ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0"),
        }  # fmt: skip


def test_gpus_that_are_numbered_anew_keep_their_rates(three_gpus, tmp_path, monkeypatch):
    before = probe_node("cuda", ProbeCache(tmp_path)).devices[0]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties",
        lambda index: types.SimpleNamespace(name="GPU", uuid=f"u{1 - index}", major=9, minor=0),
    )  # fmt: skip
    found = probe_node("cuda", ProbeCache(tmp_path))
    assert found.devices[1].uuid == "u0"
    assert found.devices[1].rates == before.rates
    assert found.devices[1].is_cached
    assert {link.source for link in found.links} == {"cpu", "cuda:0", "cuda:1"}

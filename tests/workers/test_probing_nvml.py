"""Who else is on a GPU."""

import os
import sys
import types

import pytest

from tightfit.workers.probing.nvml import holders_note


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for pynvml; `nvml.running` are the processes on the GPU with UUID GPU-a."""
    module = types.ModuleType("pynvml")
    module.NVMLError, module.running, module.open = NVMLError, [], 0

    def init():
        module.open += 1

    def shutdown():
        module.open -= 1

    def handle(uuid):
        if uuid != "GPU-a":
            raise NVMLError("not found")
        return uuid

    module.nvmlInit, module.nvmlShutdown = init, shutdown
    module.nvmlDeviceGetHandleByUUID = handle
    module.nvmlDeviceGetComputeRunningProcesses = lambda handle: module.running
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def process(pid, used):
    return types.SimpleNamespace(pid=pid, usedGpuMemory=used)


@pytest.mark.parametrize("uuid", ["a", "GPU-a"])
def test_others_are_named_with_what_they_hold_and_we_are_not(nvml, uuid):
    nvml.running = [process(os.getpid(), 5), process(1, 2**30), process(2, None)]
    note = holders_note("cuda:0", uuid)
    assert note == "cuda:0: others hold memory on it: process 1 1,073,741,824 bytes, process 2"
    assert nvml.open == 0


def test_where_nobody_else_is_or_nvml_does_not_know_the_gpu_there_is_no_note(nvml):
    nvml.running = [process(os.getpid(), 5)]
    assert holders_note("cuda:0", "a") is None
    assert holders_note("cuda:0", "b") is None
    assert nvml.open == 0


def test_without_a_driver_or_the_package_there_is_no_note(nvml, monkeypatch):
    def refuse():
        raise NVMLError("no driver")

    nvml.running = [process(1, 1)]
    nvml.nvmlInit = refuse
    assert holders_note("cuda:0", "a") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert holders_note("cuda:0", "a") is None

"""Every Triton kernel compiled for every chip that it is for, and its machine code held to account.

In a process of its own: here kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit.kernels import w8a16
from tightfit.kernels.compiled import CAPABILITIES, OLD_CAPABILITIES, Compiled

MODULES = (w8a16,)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "kernel_report.py")],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONSAFEPATH": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    compiled = []
    for entry in json.loads(done.stdout):
        entry["loads"] = {int(width): count for width, count in entry["loads"].items()}
        compiled.append(Compiled(**entry))
    return compiled


@pytest.mark.slow
def test_the_code_spills_nothing_fits_shared_memory_and_uses_what_the_chip_has(found):
    cases = {case.name: case for module in MODULES for case in module.compile_cases()}
    assert {one.name for one in found} == set(cases)
    assert {one.capability for one in found} == {*CAPABILITIES, *OLD_CAPABILITIES}
    for one in found:
        case, where = cases[one.name], f"{one.name} on {one.capability}"
        assert one.stack_bytes == 0, where
        assert one.shared_bytes <= one.shared_limit_bytes, where
        assert (one.num_tensor_ops > 0) is case.has_dot, where
        assert one.widest_load_bytes == 16, where


@pytest.mark.slow
def test_the_document_lists_every_kernel(found):
    text = (ROOT / "docs" / "kernels.md").read_text()
    for one in found:
        assert f"| {one.name} |" in text, "run make kernels"

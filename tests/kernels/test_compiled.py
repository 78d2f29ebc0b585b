"""Every Triton kernel compiled for every chip that it is for, and its machine code held to account.

In a process of its own: here kernels are interpreted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit.kernels.compiled import (
    CAPABILITIES,
    OLD_CAPABILITIES,
    TENSOR_MEMORY_COLUMNS,
    Compiled,
)

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(1200)  # a thousand compilations, some 7 minutes on one core


@pytest.fixture(scope="module")
def found():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        # It takes every core: what is tested beside it comes first.
        ["nice", "-n", "5", sys.executable, str(ROOT / "tools" / "kernel_report.py")],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONSAFEPATH": "1"},
        timeout=1140,
    )
    assert done.returncode == 0, done.stderr
    compiled = []
    for entry in json.loads(done.stdout):
        entry["loads"] = {int(width): count for width, count in entry["loads"].items()}
        compiled.append(Compiled(**entry))
    return compiled


WIDEST_LOADS = {("wxa16 3 bits T=1", 90): 8, ("wxa16 3 bits T=16", 90): 8}
"""Where it is not 16 bytes: a Hopper takes the tiles of 3 bits, whose elements are single bytes, in
halves of that."""


def _kind(one):
    return " ".join(one.name.split()[:4]), one.capability


@pytest.mark.slow
def test_the_code_spills_nothing_fits_shared_memory_and_uses_what_the_chip_has(found):
    assert {one.capability for one in found} == {*CAPABILITIES, *OLD_CAPABILITIES}
    for one in found:
        where = f"{one.name} on {one.capability}"
        assert one.stack_bytes == 0, where
        assert one.shared_bytes <= one.shared_limit_bytes, where
        assert one.tensor_columns <= TENSOR_MEMORY_COLUMNS, where
        assert (one.num_tensor_ops > 0) is one.has_dot, where
        assert one.widest_load_bytes == WIDEST_LOADS.get(_kind(one), 16), where


@pytest.mark.slow
def test_every_file_with_a_kernel_is_compiled(found):
    files = {
        file.stem
        for file in (ROOT / "kernels").glob("*.py")
        if "def compile_cases" in file.read_text()
    }
    assert {one.name.split()[0] for one in found} == files


@pytest.mark.slow
def test_the_document_lists_every_kernel(found):
    text = (ROOT / "docs" / "kernels.md").read_text()
    for one in found:
        assert f"| {one.name} |" in text, "run make kernels"

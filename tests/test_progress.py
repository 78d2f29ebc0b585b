"""The view of loading stages."""

import io

import pytest
from rich.console import Console

from tightfit.cluster.progress import LoadView, describe
from tightfit.workers.api import LoadProgress

MIB = 2**20


def loading(done, *, elapsed_s=2.0, message="layer 3"):
    return LoadProgress(
        phase="loading",
        bytes_done=done * MIB,
        bytes_total=100 * MIB,
        elapsed_s=elapsed_s,
        message=message,
    )


def test_a_line_tells_phase_bytes_rate_time_left_and_what_is_read():
    assert describe("stage 1", loading(40)) == (
        "stage 1: loading 40.0 MiB of 100.0 MiB (40 %), 20.0 MiB/s, 3.0 s left; layer 3"
    )


def test_a_stage_that_has_read_nothing_has_no_rate():
    assert describe("stage 0", LoadProgress(phase="waiting")) == "stage 0: waiting"
    assert (
        describe("stage 0", loading(0, message="")) == "stage 0: loading 0 bytes of 100.0 MiB (0 %)"
    )


def test_a_stage_that_has_read_all_has_no_time_left_and_a_ready_one_reads_nothing():
    measuring = LoadProgress(
        phase="calibrating", bytes_done=MIB, bytes_total=MIB, elapsed_s=1, message="kernels"
    )
    assert describe("stage 0", measuring).endswith("(100 %), 1.0 MiB/s; kernels")
    ready = LoadProgress(
        phase="ready", bytes_done=MIB, bytes_total=MIB, elapsed_s=1.5, message="kernels"
    )
    assert describe("stage 0", ready) == "stage 0: ready 1.0 MiB of 1.0 MiB (100 %) after 1.5 s"


def test_a_failed_stage_says_why():
    failed = LoadProgress(phase="failed", message="model.safetensors is truncated")
    assert describe("stage 0", failed) == "stage 0: failed; model.safetensors is truncated"


def test_without_a_terminal_lines_come_at_most_every_interval_and_on_every_change_of_phase():
    out, now = io.StringIO(), [0.0]
    console = Console(file=out, force_terminal=False)
    with LoadView(
        ["stage 0", "stage 1"], console=console, interval_s=3, clock=lambda: now[0]
    ) as view:
        for second, done in enumerate(range(0, 100, 10)):
            now[0] = second
            view.update("stage 0", loading(done))
        view.update("stage 0", LoadProgress(phase="ready", elapsed_s=10))
        view.update("stage 0", LoadProgress(phase="ready", elapsed_s=11))
        view.update("stage 1", loading(5))
    lines = out.getvalue().splitlines()
    assert [line.split(" (")[0] for line in lines] == [
        "stage 0: loading 0 bytes of 100.0 MiB",
        "stage 0: loading 30.0 MiB of 100.0 MiB",
        "stage 0: loading 60.0 MiB of 100.0 MiB",
        "stage 0: loading 90.0 MiB of 100.0 MiB",
        "stage 0: ready after 10.0 s",
        "stage 1: loading 5.0 MiB of 100.0 MiB",
    ]


@pytest.mark.parametrize("width", [80, 160])
def test_on_a_terminal_every_stage_keeps_one_row(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with LoadView(["stage 0", "stage 1"], console=console) as view:
        view.update("stage 0", loading(40))
        view.update(
            "stage 1", LoadProgress(phase="ready", bytes_done=MIB, bytes_total=MIB, elapsed_s=1)
        )
    drawn = out.getvalue()
    table = drawn[drawn.rindex("phase") :].splitlines()
    assert table[0].split() == ["phase", "read", "rate", "left"]
    assert table[1].split()[:3] == ["stage", "0", "loading"]
    assert "40.0 MiB of 100.0 MiB  20.0 MiB/s  3.0 s" in table[1]
    assert ("layer 3" in table[1]) == (width > 80)
    assert table[2].split()[:3] == ["stage", "1", "ready"]


def test_text_that_looks_like_markup_is_shown_as_it_is():
    out = io.StringIO()
    with LoadView(["stage 0"], console=Console(file=out, force_terminal=False)) as view:
        view.update("stage 0", loading(1, message="[red]x[/red]"))
    assert "[red]x[/red]" in out.getvalue()

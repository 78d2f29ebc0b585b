"""`tightfit probe`: table, JSON, inventory, refusals."""

import dataclasses
import io
import json

import pytest
import yaml
from rich.console import Console

from tightfit.cluster import cli, probe
from tightfit.cluster.planning.inventory import read_inventory
from tightfit.cluster.settings import settings
from tightfit.kernels.formats import Format
from tightfit.workers.errors import ProbeError
from tightfit.workers.probe import DEVICES
from tightfit.workers.probing.result import (
    DeviceMemory,
    DeviceProbe,
    DeviceRates,
    LinearRate,
    LinkRate,
    NodeProbe,
    parse_probe,
)

GIB = 2**30


def rates(read=9e11, seconds=1e-3):
    linears = [
        LinearRate(format=fmt, tokens=t, width=4096, weight_bytes=2**24, seconds=seconds)
        for fmt in (Format.BF16, Format.LLM_INT8)
        for t in (1, 64)
    ]
    return DeviceRates(read_bytes_per_s=read, copy_bytes_per_s=8e11, linears=tuple(linears))


def device(name="cpu", model="Some CPU @ 2GHz", free=20 * GIB + 5000, measured=True, **fields):
    return DeviceProbe(
        device=name,
        name=model,
        identity=f"{name} {model}",
        memory=DeviceMemory(total_bytes=24 * GIB, free_bytes=free, bound_by="MemAvailable"),
        rates=fields.pop("rates", rates()) if measured else None,
        is_cached=fields.pop("is_cached", False),
        **fields,
    )


def gpu(number, **fields):
    return device(f"cuda:{number}", "NVIDIA L4", capability="8.9", uuid=f"GPU-{number}", **fields)


LINK = LinkRate(source="cpu", target="cuda:0", bytes_per_s=2.5e10, latency_s=1.3e-5)


@pytest.fixture
def found(monkeypatch):
    """Lets a test say what there is; returns (say, calls)."""
    calls = []

    def say(*devices, notes=(), links=(LINK,)):
        node = NodeProbe(
            node="n1", devices=devices, links=tuple(links), notes=tuple(notes), elapsed_s=3.2
        )

        def probe_node(kinds, cache):
            calls.append((kinds, cache))
            return node

        monkeypatch.setattr(probe, "probe_node", probe_node)
        return node

    say.calls = calls
    return say


def written(tmp_path, *flags):
    path = tmp_path / "inventory.yaml"
    assert cli.main(["probe", "--out", str(path), *flags]) == 0
    return path.read_text()


# -- table and JSON --------------------------------------------------------------------------


def test_the_table_names_device_memory_rates_links_and_notes(found, capsys):
    found(device(), gpu(0, is_cached=True), gpu(1, measured=False), notes=["cuda:1 is [full]"])
    assert cli.main(["probe"]) == 0
    out = capsys.readouterr().out
    assert "n1: probed in 3.2 s" in out
    cpu, cached, full = (line.split() for line in out.splitlines()[2:5])
    assert cpu[0] == "cpu"
    assert {"24.00", "20.00", "900.0", "measured"} <= set(cpu)
    assert (cached[0], cached[-1]) == ("cuda:0", "cached")
    assert (full[0], full[-1]) == ("cuda:1", "none")
    assert "cpu: what is free is by MemAvailable\n" in out
    for text in ("llm_int8", "16.8 GB/s", "2,147.5 GOP/s", "25.0 GB/s", "0.013 ms"):
        assert text in out
    assert "note: cuda:1 is [full]" in out


def test_on_a_narrow_terminal_names_wrap_and_numbers_are_whole(found):
    node = found(gpu(0), device(model="A processor of a very long name by a firm of a longer one"))
    out = io.StringIO()
    probe.print_probe(node, Console(file=out, width=72))
    for text in ("24.00 GiB", "20.00 GiB", "900.0 GB/s", "800.0 GB/s"):
        assert out.getvalue().count(text) == 2
    assert max(map(len, out.getvalue().splitlines())) <= 72


def test_json_is_what_was_found_and_nothing_else(found, capsys):
    node = found(device(), gpu(0))
    assert cli.main(["probe", "--json"]) == 0
    assert parse_probe(capsys.readouterr().out) == node


def test_settings_come_from_the_file_with_flags_over_them(found, tmp_path):
    found(device())
    file = tmp_path / "c.yaml"
    file.write_text("probe:\n  device: cpu\n  reprobe: true\n")
    assert cli.main(["probe", "--config", str(file)]) == 0
    assert cli.main(["probe", "--config", str(file), "--device", "all"]) == 0
    assert [kinds for kinds, _ in found.calls] == ["cpu", "all"]


def test_the_kinds_of_device_are_those_that_the_probe_knows():
    (setting,) = (s for s in settings(probe.ProbeConfig) if s.key == "device")
    assert set(setting.option.choices) == set(DEVICES)


# -- inventory -------------------------------------------------------------------------------


def test_the_inventory_has_types_of_measured_rates_and_a_lot_for_each_device(found, tmp_path):
    found(device(), gpu(0), gpu(1, free=6 * GIB))
    text = written(tmp_path)
    tree = yaml.safe_load(text)
    tera = round(2 * 64 * 4096**2 / 1e-3 / 1e12, 3)
    assert tree["types"]["measured-nvidia-l4"] == {
        "kind": "gpu", "memory": 24 * GIB, "gb_per_s": 900, "fp16_tflops": tera,
        "int8_tops": tera, "price": 0.0, "watts": 0.0, "capability": 8.9,
        "rates": {"bf16": {1: 16.78, 64: 16.78}, "llm_int8": {1: 16.78, 64: 16.78}},
    }  # fmt: skip
    assert tree["types"]["measured-some-cpu-2ghz"]["kind"] == "cpu"
    (node,) = tree["nodes"]
    assert node["name"] == "n1"
    assert [lot["free"] for lot in node["devices"]] == [20 * GIB, 6 * GIB, 20 * GIB]
    assert {lot["total"] for lot in node["devices"]} == {24 * GIB}
    assert "# n1:1 is cuda:1: GPU-1" in text  # GPUs first: their numbers are torch's


def test_gpus_of_one_name_go_by_the_slowest(found, tmp_path):
    found(gpu(0), gpu(1, rates=rates(read=5e11, seconds=2e-3)))
    (kind,) = yaml.safe_load(written(tmp_path))["types"].values()
    assert kind["gb_per_s"] == 500
    assert kind["fp16_tflops"] == round(2 * 64 * 4096**2 / 2e-3 / 1e12, 3)
    assert kind["rates"]["bf16"] == {1: 8.389, 64: 8.389}


def link(source, target, gb_per_s, latency_s):
    return LinkRate(source=source, target=target, bytes_per_s=gb_per_s * 1e9, latency_s=latency_s)


def test_the_link_of_a_host_is_its_loopback_less_the_time_of_the_message(found, tmp_path):
    found(device(), links=[link("cpu", "cpu", 2.0, 100e-6)])
    (node,) = yaml.safe_load(written(tmp_path))["nodes"]
    assert node["link"] == {"latency_us": round(100 - 28 * 1024 / 2e3, 1), "gb_per_s": 2.0}


def test_the_link_of_gpus_goes_by_way_of_the_host_and_by_the_slowest(found, tmp_path):
    ways = [
        link("cpu", "cpu", 2.0, 100e-6), link("cuda:0", "cpu", 20.0, 10e-6),
        link("cpu", "cuda:0", 20.0, 10e-6), link("cuda:1", "cpu", 10.0, 30e-6),
        link("cpu", "cuda:1", 20.0, 10e-6),
    ]  # fmt: skip
    found(gpu(0), gpu(1), links=ways)
    (node,) = yaml.safe_load(written(tmp_path))["nodes"]
    assert node["link"]["gb_per_s"] == pytest.approx(1 / (1 / 2 + 1 / 10 + 1 / 20), rel=1e-3)
    message_us = 28.672 * (1 / 2 + 1 / 10 + 1 / 20)
    assert node["link"]["latency_us"] == pytest.approx(100 + 30 + 10 - message_us, abs=0.1)
    found(gpu(0), gpu(1), links=ways[1:])  # from one process to another was not measured
    assert "link" not in yaml.safe_load(written(tmp_path))["nodes"][0]


def test_a_device_without_rates_is_left_out_and_a_comment_says_so(found, tmp_path):
    found(gpu(0), gpu(1, measured=False), notes=["cuda:1 is\nfull"])
    text = written(tmp_path)
    assert len(yaml.safe_load(text)["nodes"][0]["devices"]) == 1
    assert "# Note: cuda:1 is full" in text


@pytest.mark.parametrize(("reserve", "free"), [("2GiB", 18), ("25%", 14), ("0", 20)])
def test_the_reserve_stays_free(found, tmp_path, reserve, free):
    found(device(), gpu(0))
    lots = yaml.safe_load(written(tmp_path, "--reserve", reserve))["nodes"][0]["devices"]
    assert [lot["free"] for lot in lots] == [free * GIB] * 2


def test_the_budget_is_the_cpus_share_and_no_gpus(found, tmp_path):
    found(device(), gpu(0))
    lots = yaml.safe_load(written(tmp_path, "--budget", "3GiB"))["nodes"][0]["devices"]
    assert [lot["free"] for lot in lots] == [20 * GIB, 3 * GIB]


def test_the_planner_reads_the_inventory(found, tmp_path):
    found(device(), gpu(0), gpu(1))
    written(tmp_path)
    read = read_inventory(tmp_path / "inventory.yaml")
    assert [one.free_bytes for one in read.devices] == [20 * GIB] * 3
    assert [one.type.kind for one in read.devices] == ["gpu", "gpu", "cpu"]
    assert read.devices[0].type.capability == 8.9
    assert read.devices[0].type.rates.covers({"bf16", "llm_int8"})


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--budget", "21GiB"], "less than the budget of 21.00 GiB"),
        (["--budget", "19GiB", "--reserve", "2GiB"], "18.00 GiB are left"),
        (
            ["--reserve", "90%"],
            "cpu has 20.00 GiB free (by MemAvailable); with 21.60 GiB in reserve",
        ),
    ],
)
def test_more_than_there_is_exits_with_1_and_writes_nothing(
    found, tmp_path, capsys, flags, complaint
):
    found(device())
    path = tmp_path / "inventory.yaml"
    assert cli.main(["probe", "--out", str(path), *flags]) == 1
    assert complaint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--reserve", "100%"], "probe.reserve: '100%' is neither a size"),
        (["--reserve", "nan%"], "probe.reserve: 'nan%' is neither a size"),
        (["--reserve=-1%"], "probe.reserve: '-1%' is neither a size"),
        (["--reserve", "some"], "probe.reserve: 'some' is not a size"),
        (["--budget", "0"], "probe.budget: 0 is less than 1"),
        (["--device", "cuda", "--budget", "1GiB"], "probe.budget is for the cpu"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_measures_nothing(found, capsys, flags, complaint):
    found(device())
    assert cli.main(["probe", *flags]) == 2
    assert complaint in capsys.readouterr().err
    assert found.calls == []


def test_nothing_to_write_is_said_with_the_reason(found, tmp_path, capsys):
    found(device(measured=False), notes=["cpu has 0 bytes free"])
    assert cli.main(["probe", "--out", str(tmp_path / "i.yaml")]) == 1
    assert "no device to write" in (error := capsys.readouterr().err)
    assert "cpu has 0 bytes free" in error


def test_an_inventory_that_cannot_be_written_names_its_path(found, tmp_path, capsys):
    found(device())
    assert cli.main(["probe", "--out", str(tmp_path / "no" / "i.yaml")]) == 1
    assert f"{tmp_path}/no/i.yaml: the inventory cannot be written" in capsys.readouterr().err


def test_what_the_probe_refuses_exits_with_1_and_its_words(monkeypatch, capsys):
    def probe_node(kinds, cache):
        raise ProbeError("torch is a build without CUDA")

    monkeypatch.setattr(probe, "probe_node", probe_node)
    assert cli.main(["probe", "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "tightfit probe: torch is a build without CUDA\n"


@pytest.mark.slow
def test_a_real_probe_is_cached_until_it_is_asked_anew(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tightfit.workers.probe.CPU_WIDTHS", (512,))
    states = []
    for flags in ([], [], ["--reprobe"]):
        assert cli.main(["probe", "--device", "cpu", "--json", *flags]) == 0
        states.append(json.loads(capsys.readouterr().out)["devices"][0])
    assert [state["is_cached"] for state in states] == [False, True, False]
    assert states[0]["rates"] == states[1]["rates"] != states[2]["rates"]
    assert dataclasses.fields(DeviceProbe)[0].name in states[0]

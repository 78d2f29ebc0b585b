"""`tightfit plan`: what it prints, what it refuses, and how soon."""

import json
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tightfit.cluster import cli
from tightfit.cluster.planning.inventory import CONFIGS
from tightfit.cluster.planning.plan import read_plan

TIGHTFIT = Path(sys.executable).parent / "tightfit"
SVG = "{http://www.w3.org/2000/svg}"
BLOOM = ["plan", "bloom-176b", "--inventory", "8xa100-80"]


def printed(capsys, arguments):
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_the_table_is_for_people(capsys):
    out = printed(capsys, BLOOM)
    assert out.startswith("bloom-176b on 2 × a100-80: 4.25 bits per weight\n")
    assert "no cheaper     one device less does not do: the roomiest alone would hold" in out


def test_yaml_is_a_plan_that_can_be_read_again(capsys, tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(printed(capsys, [*BLOOM, "--yaml"]))
    assert [stage.device for stage in read_plan(path).stages] == ["a:0", "a:1"]


def test_the_picture_has_every_layer_and_fills_each_device_exactly(capsys):
    arguments = ["plan", "opt-175b", "--inventory", "8xrtx-3090", "--formats", "int3,int4"]
    arguments += ["--mixed", "--spare", "quality"]
    svg = ElementTree.fromstring(printed(capsys, [*arguments, "--svg"]))
    stages = json.loads(printed(capsys, [*arguments, "--json"]))["plan"]["stages"]
    titled = [rect for rect in svg.iter(f"{SVG}rect") if rect.find(f"{SVG}title") is not None]
    labels = [rect.find(f"{SVG}title").text.partition(":")[0] for rect in titled]
    layers = [label for label in labels if label.startswith("layer ")]
    assert [int(label.split()[1].rstrip(",")) for label in layers] == list(range(96))
    assert sum("int4" in label for label in layers) == sum(
        int(part.partition("*")[2])
        for stage in stages
        for part in stage["formats"].split()
        if part.startswith("int4")
    )
    frames = [float(r.get("width")) for r in svg.iter(f"{SVG}rect") if r.get("fill") == "none"]
    assert len(frames) == len(stages)
    assert sum(float(r.get("width")) for r in titled) == pytest.approx(sum(frames), abs=2)


def test_a_pictures_words_are_escaped(tmp_path, capsys):
    model = tmp_path / "a<b & c"
    model.mkdir()
    config = yaml.safe_load((CONFIGS / "models" / "opt-175b.yaml").read_text())
    (model / "config.json").write_text(json.dumps(config))
    out = printed(capsys, ["plan", str(model), "--inventory", "8xa100-80", "--svg"])
    assert ElementTree.fromstring(out).find(f"{SVG}title").text.startswith("a<b & c: 96 layers")


def test_json_has_the_plan_the_reasons_and_the_numbers(capsys):
    tree = json.loads(printed(capsys, [*BLOOM, "--json"]))
    assert len(tree["plan"]["stages"]) == 2
    assert tree["dollars_per_hour"] == 10.0
    assert tree["explanation"]["baseline"]["devices"] == 5


def test_a_load_is_served_in_simulated_time_beside_the_prediction(capsys):
    arguments = [*BLOOM, "--sequences", "4", "--context", "64"]
    load = ["--simulate", "streams=4,prompt=8,output=48,requests=8"]
    tree = json.loads(printed(capsys, [*arguments, *load, "--json"]))
    simulation = tree["simulation"]
    assert simulation["load"] == {"streams": 4, "prompt": 8, "output": 48, "requests": 8}
    assert simulation["tokens_per_s"] == pytest.approx(tree["tokens_per_s"], rel=0.05)
    assert min(simulation["busy"]) > 0.9
    line = printed(capsys, [*arguments, *load]).splitlines()[-1]
    assert line.startswith("simulated      8 requests on 4 streams of 8 + 48 tokens: ")
    assert f"{simulation['tokens_per_s']:,.1f} tokens/s" in line
    assert json.loads(printed(capsys, [*arguments, "--json"]))["simulation"] is None


def test_replicas_are_in_the_table_json_yaml_and_picture(capsys, tmp_path):
    arguments = [*BLOOM, "--replicas", "max"]
    table = printed(capsys, arguments)
    assert "replicas       4, " in table
    assert "there can be no more: a pipeline takes at least 2 of the 8 devices" in table
    for number in range(2, 5):
        assert f"replica {number}: bloom-176b on 2 × a100-80: 4.25 bits per weight" in table
    tree = json.loads(printed(capsys, [*arguments, "--json"]))
    plans = tree["replicas"]["plans"]
    devices = [stage["device"] for plan in plans for stage in plan["stages"]]
    assert sorted(devices) == [f"a:{number}" for number in range(8)]
    assert tree["plan"] == plans[0]
    documents = printed(capsys, [*arguments, "--yaml"]).split("---\n")
    for number, text in enumerate(documents):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        assert [s.device for s in read_plan(path).stages] == devices[2 * number : 2 * number + 2]
    svg = ElementTree.fromstring(printed(capsys, [*arguments, "--svg"]))
    assert svg.find(f"{SVG}title").text.endswith("; 4 replicas")
    assert len(list(svg.iter(f"{SVG}line"))) == 3
    frames = [r for r in svg.iter(f"{SVG}rect") if r.get("fill") == "none"]
    assert len(frames) == 8


def test_every_setting_reaches_the_planner(capsys):
    flags = (
        "--sequences 2 --context 512 --formats int3,int4 --mixed --head-format bf16 "
        "--kv-formats auto --embedding-place device --min-bits 3.5 --spare quality "
        "--objective dollars --max-devices 3 --max-cost 20 --exclude a:7,t4 --same-node "
        "--pin a:1=0-29 --reserve safe --block-size 32 --max-batch-tokens 256"
    )
    arguments = ["plan", "bloom-176b", "--inventory", "mixed", "--json"]
    tree = json.loads(printed_from_file(capsys, arguments, flags.split()))["plan"]
    assert tree["embedding_place"] == "device"
    assert tree["head_format"] == tree["kv_format"] == "bf16"
    assert (tree["sequences"], tree["context"], tree["block_size"]) == (2, 512, 32)
    assert tree["max_batch_tokens"] == 256
    assert tree["bits_per_weight"] >= 3.5
    first = tree["stages"][0]
    assert (first["device"], first["first_layer"], first["end_layer"]) == ("a:1", 0, 30)
    assert len(tree["stages"]) <= 3


def printed_from_file(capsys, arguments, flags):
    text = (
        "nodes: [{name: a, devices: [{type: a100-80, count: 8}]}, {name: b, devices: [{type: t4}]}]"
    )
    path = Path("inventory.yaml")
    arguments[arguments.index("mixed")] = str(path)
    path.write_text(text)
    return printed(capsys, [*arguments, *flags])


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_settings_come_from_the_configuration_file_too(capsys, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"plan": {"model": "opt-175b", "inventory": "2xh200"}}))
    assert printed(capsys, ["plan", "--config", str(file)]).startswith("opt-175b on 1 × h200")


def test_a_checkpoints_own_config_is_planned_from(capsys, tmp_path):
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps(
            {
                "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "vocab_size": 49152, "max_position_embeddings": 1024, "rms_norm_eps": 1e-05,
            }
        )
    )  # fmt: skip
    out = printed(capsys, ["plan", str(model), "--inventory", "8xrtx-3090"])
    assert out.startswith("my-model on 1 × rtx-3090")
    assert "asked for 1 × 1,024" in out


def test_what_does_not_fit_exits_with_1_and_says_what_would(capsys):
    assert cli.main(["plan", "llama-3.1-405b", "--inventory", "4xl40s"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tightfit plan: llama-3.1-405b does not fit: all 4 devices hold")
    assert "more l40s" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["bloom-176b"], 2, "plan.inventory is missing"),
        (["bloom-176b", "--inventory", "x"], 1, "x: no such inventory; those that come with"),
        (["bloom-17", "--inventory", "2xh200"], 1, "not one of bloom-176b, llama"),
        (["m.gguf", "--inventory", "2xh200"], 1, "which a GGUF file has none of"),
        ([*BLOOM[1:], "--formats", "fp32"], 1, "fp32 is for CPUs"),
        ([*BLOOM[1:], "--head-format", "fp32"], 1, "choose fp32 for both or for neither"),
        ([*BLOOM[1:], "--formats", "int9"], 2, "plan.formats: 'int9' is not one of auto, fp32"),
        ([*BLOOM[1:], "--formats", "int4,"], 2, "is not a list such as a,b"),
        ([*BLOOM[1:], "--kv-formats", "int4"], 2, "'int4' is neither auto nor int8"),
        ([*BLOOM[1:], "--pin", "a:0"], 2, "is not like node:0=0-11"),
        ([*BLOOM[1:], "--pin", "a:0=9-3"], 2, "is not like node:0=0-11"),
        ([*BLOOM[1:], "--max-loss", "1"], 2, "plan.max_loss is by plan.sensitivity"),
        ([*BLOOM[1:], "--sensitivity", "f", "--mixed"], 2, "leave plan.formats and plan.mixed out"),
        ([*BLOOM[1:], "--sensitivity", "f"], 1, "cannot be read"),
        ([*BLOOM[1:], "--replicas", "many"], 2, "plan.replicas: 'many' is neither max nor a"),
        ([*BLOOM[1:], "--replicas", "0"], 2, "plan.replicas: '0' is neither max nor a number"),
        ([*BLOOM[1:], "--replicas", "9"], 1, "9 pipelines are asked for, and the inventory holds"),
        ([*BLOOM[1:], "--replicas", "2", "--pin", "a:0=0-9"], 1, "leave pins or replicas"),
        ([*BLOOM[1:], "--simulate", "stream=3"], 2, "plan.simulate: 'stream=3' is not like"),
        ([*BLOOM[1:], "--simulate", "output=0"], 2, "plan.simulate: 'output=0' is not like"),
        ([*BLOOM[1:], "--simulate", "requests=9999"], 2, "is of more than 1,000,000 tokens"),
        ([*BLOOM[1:], "--simulate", "prompt=2000"], 1, "of 2000 + 128 tokens is longer than"),
        ([*BLOOM[1:], "--simulate", "output=4", "--yaml"], 1, "not with --yaml"),
        ([*BLOOM[1:], "--exclude", "b"], 1, "has no b, which is to be excluded"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(capsys, arguments, code, complaint):
    assert cli.main(["plan", *arguments]) == code
    error = capsys.readouterr().err
    assert complaint in error
    assert error.count("\n") == 1


def test_a_damaged_config_is_named(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bloom", "n_layer": "many"}')
    assert cli.main(["plan", str(tmp_path), "--inventory", "2xh200"]) == 1
    assert "config.json has no" in capsys.readouterr().err


def test_planning_starts_neither_torch_nor_ray_nor_transformers():
    code = (
        f"import sys; from tightfit.cluster import cli; cli.main({BLOOM!r});"
        "print([m for m in ('torch', 'ray', 'transformers', 'grpc', 'numpy', 'huggingface_hub')"
        " if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_the_answer_for_a_176b_model_is_there_in_less_than_a_second():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([TIGHTFIT, *BLOOM], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 1.0  # 0.25 s on an idle core


def test_a_checkpoint_that_is_quantised_is_planned_as_it_is(capsys, tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
        "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8,
        "vocab_size": 1000, "max_position_embeddings": 256,
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["plan", str(tmp_path), "--inventory", "8xrtx-3090", "--json"]
    held = json.loads(printed(capsys, arguments))["plan"]
    assert held["stages"][0]["formats"] == "auto*4"
    assert held["bits_per_weight"] == pytest.approx(4.25)
    anew = json.loads(printed(capsys, [*arguments, "--formats", "int8"]))["plan"]
    assert anew["bits_per_weight"] == pytest.approx(8.0, abs=0.05)
    mixed = [*arguments, "--formats", "int4,int8", "--mixed", "--spare", "quality"]
    json.loads(printed(capsys, mixed))

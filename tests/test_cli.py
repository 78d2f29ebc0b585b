"""The command line: flags, configuration, exit codes."""

import json
import logging
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from tightfit.cluster import cli
from tightfit.cluster.errors import PlacementError
from tightfit.workers.errors import CheckpointError
from tightfit.workers.logs import ENVIRONMENT, LEVELS, log_environment

TIGHTFIT = Path(sys.executable).parent / "tightfit"


@pytest.fixture
def served(monkeypatch):
    """Puts a recorder where the deployment would be; returns the configurations it is given."""
    seen = []
    module = types.ModuleType("tightfit.cluster.deployment")

    def serve(config, plan_config):
        seen.append(config)
        return 0

    module.serve = serve
    monkeypatch.setitem(sys.modules, "tightfit.cluster.deployment", module)
    return seen


def test_serve_hands_over_the_file_with_the_flags_over_it(served, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("serve:\n  model: from-file\n  stages: 3\n  memory_budget: 1GiB\n")
    flags = ["--stages", "2", "--no-prefix-cache", "--memory-budget", "2GiB"]
    assert cli.main(["serve", "--config", str(file), *flags]) == 0
    (config,) = served
    assert config.model == "from-file"
    assert config.stages == 2
    assert config.prefix_cache is False
    assert config.memory_budget_bytes == 2 * 2**30


@pytest.fixture
def logged(served, monkeypatch, capsys, tmp_path):
    """Serves with these lines in the file and these flags; what was logged then, by level."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    for name in ENVIRONMENT.values():
        monkeypatch.setenv(name, "")

    def say(config, plan_config):
        for name in LEVELS:
            logging.getLogger("tightfit").log(
                logging.getLevelName(name.upper()), "said at %s", name
            )
        return 0

    monkeypatch.setattr(sys.modules["tightfit.cluster.deployment"], "serve", say)

    def logged(lines="", *flags):
        file = tmp_path / "c.yaml"
        file.write_text(f"serve:\n  model: m\n{lines}")
        assert cli.main(["serve", "--config", str(file), *flags]) == 0
        return capsys.readouterr().err.splitlines()

    yield logged
    root.handlers[:], root.level = handlers, level


def test_a_configuration_file_alone_says_what_is_logged_and_how(logged):
    lines = [json.loads(line) for line in logged("  log_level: info\n  log_format: json\n")]
    assert [line["level"] for line in lines] == ["info", "warning", "error"]
    assert log_environment() == {"TIGHTFIT_LOG_LEVEL": "info", "TIGHTFIT_LOG_FORMAT": "json"}


def test_flags_of_logs_go_over_the_file(logged):
    file = "  log_level: debug\n  log_format: json\n"
    (line,) = logged(file, "--log-level", "error", "--log-format", "text")
    assert line.endswith("ERROR tightfit: said at error")
    assert log_environment() == {"TIGHTFIT_LOG_LEVEL": "error", "TIGHTFIT_LOG_FORMAT": "text"}


def test_warnings_are_logged_as_text_where_nothing_is_said(logged):
    warning, error = logged()
    assert warning.endswith("WARNING tightfit: said at warning")
    assert error.endswith("ERROR tightfit: said at error")


def test_the_model_on_the_command_line_wins(served, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("serve:\n  model: from-file\n")
    assert cli.main(["serve", "given", "--config", str(file)]) == 0
    assert served[0].model == "given"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serve"], "serve.model is missing"),
        (["serve", "m", "--stages", "0"], "serve.stages: 0 is less than 1"),
        (["serve", "m", "--memory-budget", "lots"], "serve.memory_budget: 'lots' is not a size"),
        (["serve", "m", "--listen", "here"], "serve.listen: 'here' is not host:port"),
        (["serve", "m", "--config", "/nowhere.yaml"], "/nowhere.yaml: cannot be read"),
        (["status", "--target", "here"], "client.target: 'here' is not host:port"),
    ],
)
def test_a_wrong_setting_exits_with_2_and_one_line(served, capsys, arguments, complaint):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert complaint in error
    assert error.startswith(f"tightfit {arguments[0]}: ")
    assert error.count("\n") == 1
    assert served == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["serv"],
        ["serve", "m", "--stages", "two"],
        ["serve", "m", "--format", "int9"],
        ["serve", "m", "--stags", "2"],
        ["generate"],
        ["generate", "p", "--logit-bias", "x"],
        ["bench", "everything"],
    ],
)
def test_a_command_line_that_makes_no_sense_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: tightfit" in capsys.readouterr().err


def test_serve_plans_where_neither_a_plan_nor_stages_are_given(monkeypatch, tmp_path):
    handed = []
    module = types.ModuleType("tightfit.cluster.deployment")
    module.serve = lambda config, plan_config: handed.append(plan_config) or 0
    monkeypatch.setitem(sys.modules, "tightfit.cluster.deployment", module)
    file = tmp_path / "t.yaml"
    file.write_text("serve: {model: m}\nplan: {sequences: 8, context: 512}\n")
    for flags in ([], ["--stages", "2"], ["--plan", "p.yaml"]):
        assert cli.main(["serve", "--config", str(file), *flags]) == 0
    assert (handed[0].model, handed[0].sequences, handed[0].context) == ("m", 8, 512)
    assert handed[1:] == [None, None]


@pytest.mark.parametrize(
    "error",
    [PlacementError("stage 1 lacks 2 GiB"), CheckpointError("a.safetensors", "x", "is truncated")],
)
def test_what_the_deployment_refuses_exits_with_1_and_its_words(monkeypatch, capsys, error):
    module = types.ModuleType("tightfit.cluster.deployment")

    def serve(config, plan_config):
        raise error

    module.serve = serve
    monkeypatch.setitem(sys.modules, "tightfit.cluster.deployment", module)
    assert cli.main(["serve", "m"]) == 1
    assert str(error) in capsys.readouterr().err


def test_help_answers_at_once():
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([TIGHTFIT, "--help"], capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - started)
    assert "serve" in done.stdout
    assert min(times) < 0.6  # 0.07 s on an idle core

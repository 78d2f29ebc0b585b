"""Runs pods of a rendered manifest on this machine, as close to Kubernetes as processes get.

Each pod is a process in namespaces of its own: network (a pair of veth to a bridge), mounts, PIDs,
IPC and host name. Its root is read-only and holds this machine's programs, its volumes are mounted
where the manifest says, secrets and config maps among them, and it runs as the user and group of
the security context, with the environment of the manifest and no other. Names resolve through
/etc/hosts. What is not there: a scheduler, limits, probes, network policies, the operator. What
KubeRay makes of a group is written down in `ray_start`.

Needs root, `ip` (iproute2) and `unshare`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("/usr", "/bin", "/sbin", "/lib", "/lib64")
"""Of this machine: with the project and the interpreter, what an image would hold."""


def why_not() -> str | None:
    """Why pods cannot run here; None: they can."""
    if os.geteuid() != 0:
        return "pods are made of namespaces, which takes root"
    missing = [
        name for name in ("ip", "unshare", "chroot", "setpriv") if shutil.which(name) is None
    ]
    if missing:
        return f"pods need {', '.join(missing)}"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], check=False, capture_output=True
    )
    return "namespaces are not allowed here" if tried.returncode else None


def ray_start(kind: str, group: Mapping[str, Any], head: str) -> list[str]:
    """The command that KubeRay writes for a node of a group, for Ray 2.60.

    Args:
        kind: "head" or "worker".
        group: of the RayCluster; its rayStartParams go over what follows from limits.
        head: name of the head's Service.
    """
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = next((str(number) for name, number in limits.items() if name.endswith("gpu")), "0")
    filled = {
        "num-cpus": str(limits["cpu"]),
        "num-gpus": gpus,
        "metrics-export-port": "8080",
        "dashboard-agent-listen-port": "52365",
        **group["rayStartParams"],
    }
    if kind == "head":
        filled = {"dashboard-host": "0.0.0.0", **filled}
    else:
        filled = {"address": f"{head}:6379", **filled}
    flags = [
        f"--{key}" if value == "true" else f"--{key}={value}"
        for key, value in {"block": "true", **filled}.items()
    ]
    start = ["ray", "start", *(["--head"] if kind == "head" else []), *flags]
    return ["/bin/bash", "-c", "--", f"ulimit -n 65536; {shlex.join(start)}"]


class Network:
    """A bridge in a namespace of its own, and addresses on it."""

    def __init__(self) -> None:
        self._prefix = f"tf{os.getpid()}"
        self._bridge = f"{self._prefix}-sw"
        self._names: list[str] = []
        self._add(self._bridge)
        self._ip("-n", self._bridge, "link", "add", "br0", "type", "bridge")
        self._ip("-n", self._bridge, "link", "set", "br0", "up")

    @staticmethod
    def _ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True)

    def _add(self, name: str) -> None:
        self._ip("netns", "add", name)
        self._names.append(name)
        self._ip("-n", name, "link", "set", "lo", "up")

    def join(self) -> tuple[str, str]:
        """Name and address of another namespace on the bridge."""
        number = len(self._names)
        name, address = f"{self._prefix}-{number}", f"10.88.0.{number}"
        self._add(name)
        self._ip(
            "-n", self._bridge, "link", "add", f"port{number}", "type", "veth",
            "peer", "name", "eth0", "netns", name,
        )  # fmt: skip
        self._ip("-n", self._bridge, "link", "set", f"port{number}", "master", "br0", "up")
        self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        self._ip("-n", name, "link", "set", "eth0", "up")
        # Programs ask which address they would use for another network: there has to be a way.
        self._ip("-n", name, "route", "add", "default", "via", "10.88.0.254")
        return name, address

    def close(self) -> None:
        """Remove every namespace."""
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


class Node:
    """What the pods of one manifest share: the network, names, secrets, config maps, claims.

    Args:
        directory: for the pods' roots and logs.
        objects: of the manifest.
        secrets: by name: texts by key.
        claims: by name: the directory that a claim of it mounts.
    """

    def __init__(
        self,
        directory: Path,
        objects: Sequence[Mapping[str, Any]],
        *,
        secrets: Mapping[str, Mapping[str, str]],
        claims: Mapping[str, Path],
    ) -> None:
        self.directory, self.secrets, self.claims = directory, secrets, claims
        self.config_maps = {
            tree["metadata"]["name"]: tree["data"]
            for tree in objects
            if tree["kind"] == "ConfigMap"
        }
        self.network = Network()
        self.hosts: dict[str, str] = {}
        self.pods: list[Pod] = []

    def reserve(self, *names: str) -> tuple[str, str]:
        """A place on the network that these names lead to."""
        namespace, address = self.network.join()
        self.hosts |= dict.fromkeys(names, address)
        return namespace, address

    def start(
        self,
        name: str,
        template: Mapping[str, Any],
        *,
        place: tuple[str, str] | None = None,
        command: Sequence[str] | None = None,
    ) -> Pod:
        """Run the only container of a pod; `command` goes over the manifest's, as an operator's."""
        pod = Pod(self, name, template, place or self.reserve(), command)
        self.pods.append(pod)
        return pod

    def close(self) -> None:
        """End every pod, newest first."""
        for pod in reversed(self.pods):
            pod.kill()
        self.network.close()

    def __enter__(self) -> Node:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Pod:
    """One pod that runs; its output is in `log`."""

    def __init__(
        self,
        node: Node,
        name: str,
        template: Mapping[str, Any],
        place: tuple[str, str],
        command: Sequence[str] | None,
    ) -> None:
        self._node, self.name, self._spec = node, name, template["spec"]
        (self.container,) = self._spec["containers"]
        self.namespace, self.address = place
        self.log = node.directory / f"{name}.log"
        self._root = node.directory / f"{name}.root"
        self._root.mkdir()
        script = node.directory / f"{name}.sh"
        script.write_text(self._script(list(command or self.container["args"])))
        self._output = self.log.open("w")
        self.process = subprocess.Popen(
            [
                "ip", "netns", "exec", self.namespace,
                "unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child",
                "bash", "-e", str(script),
            ],
            stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT,
        )  # fmt: skip

    # -- what the pod sees -------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """Of the manifest, which has no secret in it, and what the image sets."""
        found = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": "/home/tightfit",
            "PYTHONPATH": str(ROOT / "src"),
            "PYTHONSAFEPATH": "1",
            "HOSTNAME": self.name,
        }
        variables = self.container.get("env", [])
        return found | {variable["name"]: variable["value"] for variable in variables}

    def _volume(self, name: str) -> Path | None:
        """Directory that a volume mounts; None: a fresh one in memory."""
        (volume,) = (v for v in self._spec["volumes"] if v["name"] == name)
        if "emptyDir" in volume:
            return None
        if "persistentVolumeClaim" in volume:
            return self._node.claims[volume["persistentVolumeClaim"]["claimName"]]
        files = self._node.directory / f"{self.name}.{name}"
        files.mkdir()
        if "configMap" in volume:
            content = self._node.config_maps[volume["configMap"]["name"]]
            wanted = {key: key for key in content}
            mode = 0o644
        else:
            content = self._node.secrets[volume["secret"]["secretName"]]
            items = volume["secret"].get("items")
            wanted = (
                {i["key"]: i["path"] for i in items} if items else {key: key for key in content}
            )
            mode = volume["secret"]["defaultMode"]
        group = self._spec["securityContext"]["fsGroup"]
        for key, path in wanted.items():
            (files / path).write_text(content[key])
            os.chown(files / path, 0, group)
            (files / path).chmod(mode)
        return files

    def _script(self, command: list[str]) -> str:
        """Makes the pod's root, enters it and becomes the command."""
        root = self._root
        context = self.container["securityContext"]
        owner = f"{context['runAsUser']}:{context['runAsGroup']}"
        lines = [
            f"hostname {self.name}",
            f"mount -t tmpfs -o mode=755 tmpfs {root}",
            f"cp -a --reflink=auto /etc {root}/etc",
            # There is no name server: one that refuses at once, not one that keeps silent.
            f"rm -f {root}/etc/resolv.conf && echo nameserver 127.0.0.1 > {root}/etc/resolv.conf",
            f"mkdir -p {root}/proc {root}/sys {root}/dev",
            f"mount --rbind /dev {root}/dev",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /sys {root}/sys",
        ]
        lines += [f"echo {address} {name} >> {root}/etc/hosts" for name, address in self._hosts()]
        for mount in self.container["volumeMounts"]:
            source, target = self._volume(mount["name"]), f"{root}{mount['mountPath']}"
            lines.append(f"mkdir -p {target}")
            if source is None:
                lines.append(f"mount -t tmpfs -o mode=777 tmpfs {target}")
            else:
                lines.append(f"mount --bind {source} {target}")
                if mount.get("readOnly"):
                    lines.append(f"mount -o remount,bind,ro {target}")
        # Last, as the checkout may lie below what a volume is mounted over, such as /tmp.
        for path in [*PROGRAMS, *self._own_programs()]:
            if Path(path).is_symlink():
                lines.append(f"ln -s {os.readlink(path)} {root}{path}")
            elif Path(path).is_dir():
                lines.append(f"mkdir -p {root}{path} && mount --bind -o ro {path} {root}{path}")
        if context["readOnlyRootFilesystem"]:
            lines.append(f"mount -o remount,ro {root}")
        environment = shlex.join(f"{key}={value}" for key, value in self.environment().items())
        groups = self._spec["securityContext"]["fsGroup"]
        lines.append(
            f"exec chroot --userspec={owner} --groups={groups} {root} "
            f"setpriv --no-new-privs env -i --chdir=/home/tightfit {environment} "
            f"{shlex.join(command)}"
        )
        return "\n".join(lines) + "\n"

    def _own_programs(self) -> list[str]:
        """The interpreter, its environment, the project; none inside another."""
        paths = {Path(p).resolve() for p in (sys.prefix, sys.base_prefix, ROOT)}
        paths |= {Path(p).resolve() for p in sys.path if Path(p).is_dir()}
        outer = [p for p in paths if not any(q != p and q in p.parents for q in paths)]
        return [str(p) for p in outer if not str(p).startswith("/usr/")]

    def _hosts(self) -> list[tuple[str, str]]:
        return [(name, address) for name, address in self._node.hosts.items()] + [
            (self.name, self.address)
        ]

    # -- its life ----------------------------------------------------------------------------

    @property
    def output(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text()

    def wait_for(self, text: str, limit_s: float) -> None:
        """Until it has printed `text`."""
        deadline = time.monotonic() + limit_s
        while text not in self.output:
            assert self.process.poll() is None, f"{self.name} ended: {self.output}"
            assert time.monotonic() < deadline, f"{self.name} is not ready: {self.output}"
            time.sleep(0.1)

    def wait(self, limit_s: float) -> int:
        """Its exit code."""
        return self.process.wait(timeout=limit_s)

    def terminate(self) -> None:
        """SIGTERM to its first process, as a kubelet sends it."""
        (unshare,) = [psutil.Process(self.process.pid)]
        (first,) = unshare.children()
        first.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End every process of the pod."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._output.close()

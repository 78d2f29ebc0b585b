"""What this process may use of its host: memory and cores, from the kernel. Standard library only.

Control groups of both versions count, each with all its ancestors: the tightest one binds. Of what
a group uses, its inactive file pages are not counted: the kernel gives them back when it needs the
room (a checkpoint that was just read would else look like a full host).
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tightfit.workers.errors import ProbeError
from tightfit.workers.probing.result import DeviceMemory

NO_LIMIT_BYTES: Final = 2**60
"""Version 1 writes 2⁶³ less a page where there is no limit."""
RLIMITS: Final = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""Limits of a process, and what counts against each in /proc/self/status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """One control group's directory of one hierarchy."""

    path: Path
    is_v2: bool

    @property
    def label(self) -> str:
        return f"cgroup {self.path}"


def host_memory(root: Path = Path("/"), rlimits: Mapping[str, int] | None = None) -> DeviceMemory:
    """What may be allocated now, and which limit says so.

    Args:
        root: directory in which proc/ and sys/ lie.
        rlimits: bytes by the names of `RLIMITS`; None: this process's.

    Raises:
        ProbeError: the kernel does not say what is available.
    """
    info = _sizes(root / "proc/meminfo")
    if not {"MemTotal", "MemAvailable"} <= info.keys():
        raise ProbeError(
            f"{root / 'proc/meminfo'} does not say MemTotal and MemAvailable; Linux is needed"
        )
    total = info["MemTotal"]
    free = {"MemAvailable": info["MemAvailable"]}
    for group in _groups(root, "memory"):
        limit = _memory_limit(group)
        if limit is not None:
            total = min(total, limit)
            free[group.label] = limit - _memory_in_use(group)
    status = _sizes(root / "proc/self/status")
    for name, limit in (_own_rlimits() if rlimits is None else rlimits).items():
        free[name] = limit - status.get(RLIMITS[name], 0)
    bound_by = min(free, key=lambda name: free[name])
    return DeviceMemory(
        total_bytes=total, free_bytes=max(0, min(total, free[bound_by])), bound_by=bound_by
    )


def host_cores(root: Path = Path("/"), num_affine: int | None = None) -> float:
    """Cores that this process may keep busy: by its affinity and its groups' quotas.

    Args:
        root: as for `host_memory`.
        num_affine: cores that it may run on; None: what the kernel says.
    """
    cores = float(len(os.sched_getaffinity(0)) if num_affine is None else num_affine)
    for group in _groups(root, "cpu"):
        quota = _cpu_quota(group)
        if quota is not None:
            cores = min(cores, quota)
    return cores


def processor_name(root: Path = Path("/")) -> str:
    """The processor's, as the kernel has it; on some architectures it has none."""
    text = _text(root / "proc/cpuinfo") or ""
    found = re.search(r"^model name\s*:\s*(\S.*)$", text, re.MULTILINE)
    return found[1].strip() if found else os.uname().machine


# -- control groups --------------------------------------------------------------------------


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """This process's groups with their ancestors, innermost first."""
    own = list(_memberships(_text(root / "proc/self/cgroup") or ""))
    for mount_root, mount_point, is_v2, options in _mounts(
        _text(root / "proc/self/mountinfo") or ""
    ):
        if not is_v2 and controller not in options:
            continue
        top = root / mount_point.lstrip("/")
        for controllers, path in own:
            if controllers == () if is_v2 else controller in controllers:
                yield from _upwards(top, _below(path, mount_root), is_v2=is_v2)


def _upwards(top: Path, below: str, *, is_v2: bool) -> Iterator[_Group]:
    """A group and its ancestors up to the mount point.

    In a container that sees only its own part of the hierarchy the path may name a directory that
    is not there: what is there counts.
    """
    parts = [part for part in below.split("/") if part]
    if ".." in parts:  # outside of what this control-group namespace shows
        parts = []
    for length in range(len(parts), -1, -1):
        directory = top.joinpath(*parts[:length])
        if directory.is_dir():
            yield _Group(path=directory, is_v2=is_v2)


def _below(path: str, mount_root: str) -> str:
    """A group's path from its mount point, of which `mount_root` is the path in the hierarchy."""
    prefix = mount_root.rstrip("/")
    if path == prefix or path.startswith(f"{prefix}/"):
        return path[len(prefix) :]
    return path


def _memberships(text: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """(controllers, path) of every line of /proc/self/cgroup; version 2 has no controllers."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        yield tuple(name for name in controllers.split(",") if name), path


def _mounts(text: str) -> Iterator[tuple[str, str, bool, list[str]]]:
    """(root, mount point, is version 2, options) of every hierarchy in /proc/self/mountinfo."""
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) >= 5 and len(kind) >= 3 and kind[0] in ("cgroup", "cgroup2"):
            yield (
                _unescaped(fields[3]),
                _unescaped(fields[4]),
                kind[0] == "cgroup2",
                kind[-1].split(","),
            )


def _unescaped(path: str) -> str:
    """Mount points have blanks and backslashes as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)


def _memory_limit(group: _Group) -> int | None:
    """Bytes. From memory.high on the kernel slows a group down and takes its pages: no use."""
    names = ("memory.max", "memory.high") if group.is_v2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(group.path / name)) is not None]
    found = min(limits, default=NO_LIMIT_BYTES)
    return found if found < NO_LIMIT_BYTES else None


def _memory_in_use(group: _Group) -> int:
    """Bytes that the kernel cannot simply take back."""
    name = "memory.current" if group.is_v2 else "memory.usage_in_bytes"
    reclaimable = "inactive_file" if group.is_v2 else "total_inactive_file"
    lines = (line.split() for line in (_text(group.path / "memory.stat") or "").splitlines())
    stat = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdecimal()}
    return max(0, (_number(group.path / name) or 0) - stat.get(reclaimable, 0))


def _cpu_quota(group: _Group) -> float | None:
    """Cores; None where there is no quota ("max", or −1 in version 1)."""
    if group.is_v2:
        fields = (_text(group.path / "cpu.max") or "").split()
        quota, period = (_natural(field) for field in (*fields, "", "")[:2])
    else:
        quota = _number(group.path / "cpu.cfs_quota_us")
        period = _number(group.path / "cpu.cfs_period_us")
    return quota / period if quota and period else None


# -- files -----------------------------------------------------------------------------------


def _text(path: Path) -> str | None:
    try:
        return path.read_text(errors="replace")
    except OSError:  # not there, or not for us: no limit that we could know
        return None


def _natural(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _number(path: Path) -> int | None:
    return _natural((_text(path) or "").strip())


def _sizes(path: Path) -> dict[str, int]:
    """Bytes by name, of lines such as "MemTotal:  24576 kB"."""
    return {
        found[1]: int(found[2]) * 1024
        for found in re.finditer(r"^(\w+):\s+(\d+) kB$", _text(path) or "", re.MULTILINE)
    }


def _own_rlimits(names: Iterable[str] = tuple(RLIMITS)) -> dict[str, int]:
    limits = {name: resource.getrlimit(getattr(resource, name))[0] for name in names}
    return {name: limit for name, limit in limits.items() if limit != resource.RLIM_INFINITY}

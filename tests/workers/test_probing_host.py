"""What a process may use of its host, read from files as the kernel writes them."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tightfit.workers.errors import ProbeError
from tightfit.workers.probing.host import host_cores, host_memory, processor_name
from tightfit.workers.probing.result import parse_probe

GIB = 2**30
V1_NONE = 2**63 - 4096
"""What version 1 writes where there is no limit."""
V1_MOUNTS = (
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
)
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


class Host:
    """A directory that looks like / to the probe: 64 GiB of memory, 48 of them available."""

    def __init__(self, root):
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {64 * 2**20} kB\nMemAvailable: {48 * 2**20} kB\n")
        self.write("proc/self/status", f"VmSize: {2 * 2**20} kB\nVmData: {2**20} kB\n")

    def write(self, path, content):
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(content))

    def v1(self, own, mount_root="/"):
        self.write(
            "proc/self/cgroup", f"9:name=systemd:/\n4:memory:{own}\n1:cpu,cpuacct:{own}\n0::/\n"
        )
        self.write("proc/self/mountinfo", V1_MOUNTS.format(root=mount_root))

    def v1_memory(self, group, limit, used, inactive=0):
        at = f"sys/fs/cgroup/memory{group}"
        self.write(f"{at}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{at}/memory.usage_in_bytes", f"{used}\n")
        self.write(f"{at}/memory.stat", f"inactive_file 0\ntotal_inactive_file {inactive}\n")

    def v2(self, own):
        self.write("proc/self/cgroup", f"0::{own}\n")
        self.write("proc/self/mountinfo", V2_MOUNTS)

    def v2_memory(self, group, limit, used, inactive=0, high="max"):
        at = f"sys/fs/cgroup{group}"
        self.write(f"{at}/memory.max", f"{limit}\n")
        self.write(f"{at}/memory.high", f"{high}\n")
        self.write(f"{at}/memory.current", f"{used}\n")
        self.write(f"{at}/memory.stat", f"anon 5\ninactive_file {inactive}\n")

    def memory(self, **rlimits):
        return host_memory(self.root, rlimits)


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


# -- memory ----------------------------------------------------------------------------------


def test_without_limits_what_the_kernel_calls_available_is_free(host):
    memory = host.memory()
    assert (memory.total_bytes, memory.free_bytes) == (64 * GIB, 48 * GIB)
    assert memory.bound_by == "MemAvailable"


def test_a_kernel_that_does_not_say_what_is_available_is_refused_by_name(tmp_path):
    with pytest.raises(ProbeError, match="meminfo does not say MemTotal and MemAvailable"):
        host_memory(tmp_path, {})


def test_a_v2_limit_less_what_is_in_use_is_free_and_names_its_group(host):
    host.v2("/app")
    host.v2_memory("/app", 8 * GIB, 3 * GIB)
    memory = host.memory()
    assert (memory.total_bytes, memory.free_bytes) == (8 * GIB, 5 * GIB)
    assert memory.bound_by == f"cgroup {host.root}/sys/fs/cgroup/app"


def test_the_word_max_is_no_limit(host):
    host.v2("/app")
    host.v2_memory("/app", "max", 3 * GIB)
    assert host.memory().bound_by == "MemAvailable"


def test_an_ancestor_with_less_room_binds_in_v2(host):
    host.v2("/slice/app")
    host.v2_memory("/slice", 10 * GIB, 9 * GIB)
    host.v2_memory("/slice/app", 8 * GIB, 3 * GIB)
    memory = host.memory()
    assert (memory.total_bytes, memory.free_bytes) == (8 * GIB, 1 * GIB)
    assert memory.bound_by.endswith("/slice")


def test_an_ancestor_with_less_room_binds_in_v1(host):
    host.v1("/docker/abc")
    host.v1_memory("", V1_NONE, 30 * GIB)
    host.v1_memory("/docker", 6 * GIB, 4 * GIB)
    host.v1_memory("/docker/abc", 4 * GIB, 1 * GIB)
    memory = host.memory()
    assert (memory.total_bytes, memory.free_bytes) == (4 * GIB, 2 * GIB)
    assert memory.bound_by.endswith("/memory/docker")


def test_what_v1_writes_for_no_limit_is_none(host):
    host.v1("/app")
    host.v1_memory("/app", V1_NONE, 5 * GIB)
    assert host.memory().bound_by == "MemAvailable"


def test_a_container_of_v1_finds_its_group_by_the_root_of_its_mount(host):
    """Docker mounts the container's own group at the mount point."""
    host.v1("/docker/abc", mount_root="/docker/abc")
    host.v1_memory("", 4 * GIB, 1 * GIB)
    assert host.memory().free_bytes == 3 * GIB


def test_a_path_that_the_container_does_not_see_counts_from_what_it_sees(host):
    host.v2("/../outside")
    host.v2_memory("", 4 * GIB, 1 * GIB)
    assert host.memory().free_bytes == 3 * GIB


def test_file_pages_that_the_kernel_can_take_back_are_not_in_use(host):
    host.v2("/app")
    host.v2_memory("/app", 8 * GIB, 7 * GIB, inactive=5 * GIB)
    assert host.memory().free_bytes == 6 * GIB
    host.v1("/app")
    host.v1_memory("/app", 8 * GIB, 7 * GIB, inactive=4 * GIB)
    assert host.memory().free_bytes == 5 * GIB


def test_memory_from_which_on_a_group_is_slowed_down_is_a_limit(host):
    host.v2("/app")
    host.v2_memory("/app", 8 * GIB, 3 * GIB, high=4 * GIB)
    assert host.memory().free_bytes == 1 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_free(host):
    host.v2("/app")
    host.v2_memory("/app", 2 * GIB, 3 * GIB)
    assert host.memory().free_bytes == 0


@pytest.mark.parametrize(("name", "used"), [("RLIMIT_AS", 2), ("RLIMIT_DATA", 1)])
def test_a_limit_of_the_process_counts_less_what_it_has(host, name, used):
    memory = host.memory(**{name: 10 * GIB})
    assert memory.free_bytes == (10 - used) * GIB
    assert memory.bound_by == name


def test_files_full_of_nonsense_are_no_limit(host):
    host.v2("/app")
    host.v2_memory("/app", "soon", "\x00", inactive="many")
    host.write("proc/self/mountinfo", "nonsense\n - \n1 - cgroup2\n" + V2_MOUNTS)
    assert host.memory().bound_by == "MemAvailable"


def test_a_real_limit_of_the_process_is_seen():
    code = "from tightfit.workers.probing.host import host_memory; print(host_memory().bound_by)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29)),
    )  # fmt: skip
    assert done.stdout.strip() == "RLIMIT_AS"


def test_this_host_has_memory_and_cores():
    memory = host_memory()
    assert 0 < memory.free_bytes <= memory.total_bytes
    assert 0 < host_cores() <= os.cpu_count()
    assert processor_name()


# -- cores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 16), ("250000 100000", 2.5), ("", 16), ("9900000 100000", 16)],
)
def test_a_v2_quota_limits_the_cores(host, text, cores):
    host.v2("/app")
    host.write("sys/fs/cgroup/app/cpu.max", text)
    assert host_cores(host.root, 16) == cores


@pytest.mark.parametrize(("quota", "cores"), [(-1, 16), (150000, 1.5)])
def test_a_v1_quota_limits_the_cores(host, quota, cores):
    host.v1("/app")
    host.write("sys/fs/cgroup/cpu/app/cpu.cfs_quota_us", quota)
    host.write("sys/fs/cgroup/cpu/app/cpu.cfs_period_us", 100000)
    assert host_cores(host.root, 16) == cores


def test_the_processor_is_called_as_the_kernel_calls_it(host):
    host.write("proc/cpuinfo", "processor : 0\nmodel name\t: Some CPU @ 2.0GHz\n")
    assert processor_name(host.root) == "Some CPU @ 2.0GHz"
    assert processor_name(host.root / "nowhere") == os.uname().machine


# -- a real group ----------------------------------------------------------------------------


@pytest.fixture
def limited_group():
    """A control group with 1 GiB, made here; skips where this process may not."""
    v1, v2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    if (v1 / "memory.limit_in_bytes").exists():
        group, file = v1 / f"tightfit-test-{os.getpid()}", "memory.limit_in_bytes"
    elif "memory" in (v2 / "cgroup.subtree_control").read_text().split():
        group, file = v2 / f"tightfit-test-{os.getpid()}", "memory.max"
    else:
        pytest.skip("no memory controller to make a group in")
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"may make no control group: {error}")
    try:
        (group / file).write_text(str(GIB))
        yield group
    finally:
        group.rmdir()


@pytest.mark.slow
def test_the_probe_stays_within_a_control_group_of_1_gib_and_names_it(limited_group, tmp_path):
    procs = limited_group / "cgroup.procs"
    code = (
        f"import os; open({str(procs)!r}, 'w').write(str(os.getpid()));"
        "from tightfit.cluster.cli import main; raise SystemExit(main(['probe', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (device, *_) = parse_probe(done.stdout).devices
    assert device.memory.bound_by == f"cgroup {limited_group}"
    assert device.memory.total_bytes == GIB
    assert 0 < device.memory.free_bytes < GIB
    assert device.rates is not None
    assert max(linear.width for linear in device.rates.linears) < 4096

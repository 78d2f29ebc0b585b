"""Runs the steps of the Dockerfiles where there is no container engine, and tries the images.

`python tools/image_check.py [Dockerfile …]`, as root, with debootstrap installed. Each stage is a
Debian of its own below build/image-check, in which RUN is a shell after chroot, in mounts and
processes of its own. The base image is not fetched: Debian takes its place, so that of the
Dockerfile for GPUs everything runs but what needs a GPU, or Ubuntu. How this host reaches package
indexes (pip's configuration, apt's sources, certificates) is lent to the steps, not to the images.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from dockerfile import Stage, Step, command, read_dockerfile

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "image-check"
SUITE = "bookworm"
# pip here may have its own places for PyTorch; its index for CPUs is then not asked.
ARGUMENTS = {"TORCH_INDEX": os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple")}
TRIALS = (
    ["tightfit", "--version"],
    ["tightfit", "plan", "bloom-176b", "--inventory", "8xa100-80"],
    ["ray", "--version"],
    ["python", "-c", "import tightfit.cluster.launch, tightfit.workers.actor"],
    ["python", "-c", "from tightfit.cluster.tracing import otlp_exporter as o; o('http://a:4317')"],
    ["sh", "-c", 'test "$(id -u)" = 10001 && test "$PWD" = /home/tightfit && test -w /checkpoints'],
)
CERTIFICATE_PLACES = ("/etc/ssl", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates")
# $1 the stage's root; then lent paths, --, and the command of chroot.
ENTER = """
root=$1; shift
mount --make-rprivate /
for place in proc sys dev; do mkdir -p "$root/$place"; done
mount -t proc proc "$root/proc"; mount --rbind /sys "$root/sys"; mount --rbind /dev "$root/dev"
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$1"
    else mkdir -p "$(dirname "$root$1")"; touch "$root$1"; fi
    mount --bind "$1" "$root$1"; mount -o remount,bind,ro "$root$1"; shift
done; shift
exec chroot "$@"
"""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def lent() -> list[str]:
    """Files and directories by which this host reaches package indexes."""
    names = ["/etc/resolv.conf", "/etc/hosts"]
    configuration = subprocess.run(
        [sys.executable, "-m", "pip", "config", "debug"], capture_output=True, text=True, check=True
    ).stdout
    names += re.findall(r"(/\S+), exists: True", configuration)
    names += re.findall(r"[ '=](/[\w./-]+)", configuration)
    # An index in files leads to packages beside it.
    names += [str(Path(i).parent) for i in re.findall(r"file://(/[\w./-]+)", configuration)]
    names += [value for key, value in os.environ.items() if key.startswith("PIP_")]
    found = sorted({n for n in names if n.startswith("/") and Path(n).exists()})
    others = (str(ROOT), sys.prefix, *CERTIFICATE_PLACES)
    kept = [name for name in found if name.endswith("pip.conf") or not name.startswith(others)]
    return [*kept, str(certificates())]


def certificates() -> Path:
    """A copy of the authorities that this host trusts: the packages of a stage write their own
    where they lie here."""
    copy_of = WORK / "certificates.crt"
    source = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
    shutil.copy(source or "/etc/ssl/certs/ca-certificates.crt", copy_of)
    return copy_of


def pip_settings() -> dict[str, str]:
    """pip's environment variables here, and those of a proxy."""
    ours = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or "proxy" in k.lower()}
    return {**ours, "PIP_CERT": str(WORK / "certificates.crt")}


def debian() -> Path:
    """An archive of a small Debian, made once."""
    archive = WORK / f"{SUITE}.tar"
    if not archive.exists():
        say(f"debootstrap {SUITE}")
        WORK.mkdir(parents=True, exist_ok=True)
        fresh = WORK / "debootstrap"
        shutil.rmtree(fresh, ignore_errors=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", SUITE, str(fresh)],
            stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip
        for source in [
            Path("/etc/apt/sources.list"),
            Path("/etc/apt/sources.list.d/debian.sources"),
        ]:
            if source.exists():
                shutil.copy(source, fresh / source.relative_to("/"))
        part = archive.with_suffix(".part")
        subprocess.run(["tar", "-C", str(fresh), "-cf", str(part), "."], check=True)
        part.rename(archive)
        shutil.rmtree(fresh)
    return archive


def inside(root: Path, step: Step | Stage, words: Sequence[str], *, lend: bool) -> None:
    """Run a command in a stage, as the user, in the directory and with the variables of `step`.

    Raises:
        CalledProcessError: it fails.
    """
    user = "0:0" if step.user == "root" else step.user
    home = "/root" if step.user == "root" else "/home/tightfit"
    environment = {"HOME": home, **(pip_settings() if lend else {}), **step.environment}
    entered = f"cd {shlex.quote(step.directory)} && exec {shlex.join(words)}"
    subprocess.run(
        [
            "unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-euc", ENTER, "enter",
            str(root), *(lent() if lend else []), "--", f"--userspec={user}", str(root),
            "/bin/sh", "-c", entered,
        ],
        env=environment, stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip


def context() -> list[Path]:
    """What .dockerignore lets through, as paths below the project."""
    rules = (ROOT / ".dockerignore").read_text().split("\n")
    return [Path(rule[1:]) for rule in rules if rule.startswith("!")]


def copy(step: Step, root: Path, roots: dict[str, Path]) -> None:
    """COPY, from the project or from a stage."""
    flags = [word for word in step.text.split() if word.startswith("--")]
    *sources, target = [word for word in step.text.split() if not word.startswith("--")]
    # Joined as text: an absolute path would lead out of the stage, to this machine's own files.
    goal = Path(f"{root}/{target if target.startswith('/') else f'{step.directory}/{target}'}")
    if ".." in goal.parts:
        raise ValueError(f"COPY {step.text}: leads out of the image")
    if flags:
        [stage] = [flag.removeprefix("--from=") for flag in flags]
        copies = [(roots[stage] / source.lstrip("/"), goal) for source in sources]
    elif sources == ["."]:
        copies = [(ROOT / path, goal / path) for path in context()]
    else:
        copies = [(ROOT / source, goal / Path(source).name) for source in sources]
    for source, end in copies:
        end.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", "--no-target-directory", str(source), str(end)], check=True)


def build(stages: Sequence[Stage], work: Path) -> Path:
    """Run every step of every stage; returns the last one's root."""
    roots: dict[str, Path] = {}
    for stage in stages:
        root = roots[stage.name] = work / stage.name
        root.mkdir(parents=True)
        say(f"stage {stage.name}: Debian {SUITE} in the place of {stage.base}")
        subprocess.run(["tar", "-C", str(root), "-xf", str(debian())], check=True)
        for step in stage.steps:
            say(f"{step.instruction} {step.text[:100]}")
            if step.instruction == "RUN":
                inside(root, step, ["/bin/sh", "-c", step.text], lend=True)
            elif step.instruction == "COPY":
                copy(step, root, roots)
            elif step.instruction == "WORKDIR":
                (root / step.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
    return roots[stages[-1].name]


def check(dockerfile: Path) -> None:
    """Build one image and try it.

    Raises:
        CalledProcessError: a step or a trial fails.
    """
    stages = read_dockerfile(dockerfile.read_text(), ARGUMENTS)
    work = WORK / dockerfile.name
    shutil.rmtree(work, ignore_errors=True)
    try:
        root = build(stages, work)
        entrypoint = command(stages[-1])[:-2]
        for words in (*TRIALS, command(stages[-1])[-2:]):
            say(f"as {stages[-1].user}: {shlex.join([*entrypoint, *words])}")
            inside(root, stages[-1], [*entrypoint, *words], lend=False)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"{dockerfile.name}: every step and every trial succeeded")


def main(names: Sequence[str]) -> int:
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print("image_check: needs root, and Debian's package debootstrap", file=sys.stderr)
        return 2
    for name in names or ["Dockerfile.cpu", "Dockerfile"]:
        try:
            check(ROOT / name)
        except subprocess.CalledProcessError as error:
            print(f"image_check: {name}: exit code {error.returncode}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

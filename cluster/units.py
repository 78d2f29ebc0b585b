"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re

_FACTORS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
    "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of "4GiB", "1.5 GB", "800MB" or "4096".

    Raises:
        ValueError: no number, or a unit that is not known.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write a number with B, KB, MB, GB, MiB or GiB")
    number = match.group(1)
    return int(number) * factor if number.isdigit() else round(float(number) * factor)


def format_bytes(num_bytes: float) -> str:
    """A size in binary units, to three digits or so: "135.4 MiB"."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.{_decimals(unit)}f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


def _decimals(unit: str) -> int:
    return 2 if unit == "GiB" else 1


def format_seconds(seconds: float) -> str:
    """A duration: "3.2 s", "1 min 05 s", "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"

"""The machine code that ptxas made, taken apart with the tools that come with Triton."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import triton

INSTRUCTION_BYTES = 16
"""Of every instruction, since capability 70."""

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/.*$", re.MULTILINE)
"""One of nvdisasm's, with its address."""


def resource_usage(cubin: bytes) -> str:
    """What cuobjdump says of registers, stack and memory."""
    return _run("cuobjdump", cubin, "--dump-resource-usage")


def disassemble(cubins: Sequence[bytes], capability: int) -> list[str]:
    """The instructions of each cubin.

    In one run of nvdisasm for all, as it takes longer to start than to read a dozen kernels: it is
    given the bare code, one after the other, and what it prints is cut by the addresses.

    Args:
        capability: × 10, one that the tools still know: 75 or more.
    """
    codes = [_code(cubin) for cubin in cubins]
    *begins, end = accumulate(map(len, codes), initial=0)
    architecture = f"SM{capability}a" if capability >= 90 else f"SM{capability}"  # as Triton builds
    printed = _run("nvdisasm", b"".join(codes), "--no-dataflow", "--binary", architecture)
    parts: list[list[str]] = [[] for _ in codes]
    last = 0
    for line in _INSTRUCTION.finditer(printed):
        last = int(line[1], 16)
        parts[bisect(begins, last) - 1].append(line[0])
    if last + INSTRUCTION_BYTES != end:
        raise ValueError(f"{architecture}: nvdisasm's last instruction is at {last} of {end} bytes")
    return ["\n".join(part) for part in parts]


def _code(cubin: bytes) -> bytes:
    """The functions' sections of an ELF file of 64 bits.

    Source: the ELF-64 object file format; section headers have name, type, flags, address, offset
    and size first.
    """
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    header_bytes, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * header_bytes) for i in range(count)]
    names = headers[of_names][4]
    return b"".join(
        cubin[offset : offset + size]
        for name, _, _, _, offset, size in headers
        if cubin.startswith(b".text.", names + name)
    )


def _run(tool: str, content: bytes, *options: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(content)
        file.flush()
        command = [str(path), *options, file.name]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=60
        ).stdout


def figure(usage: str, name: str) -> int:
    """One of cuobjdump's numbers, such as REG."""
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump printed no {name} in {usage!r}")
    return int(found[1])


def loads(code: str) -> dict[int, int]:
    """Loads from global memory by bytes; those through shared memory (LDGSTS) included."""
    widths: Counter[int] = Counter()
    for modifiers in re.findall(r"\bLDG(?:STS)?((?:\.[A-Z0-9_]+)+)", code):
        bits = [int(part) for part in re.findall(r"\.(?:[US])?(8|16|64|128)\b", modifiers)]
        widths[bits[0] // 8 if bits else 4] += 1
    return dict(widths)


def ptx_loads(code: str) -> dict[int, int]:
    """The same of PTX: `ld.global.v4.b32` loads 4 × 4 bytes."""
    widths: Counter[int] = Counter()
    for count, bits in re.findall(r"\bld\.global(?:\.[a-z_:]+)*(?:\.v(\d))?\.[a-z](\d+)\b", code):
        widths[int(count or 1) * int(bits) // 8] += 1
    return dict(widths)

"""Triton kernels compiled ahead of time, without a GPU, and what the machine code tells of them.

A kernel that compiles need not launch, and one that launches need not be fast: registers, spills,
shared memory, tensor cores and the width of loads are read from the code that ptxas made.

Names of capabilities: 80 A100, 86 A10 and RTX 30, 89 L4, L40S and RTX 40, 90 H100, 100 B200; 75 T4
and 70 V100 have no tensor cores in Triton.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any, Final, TypeVar

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tightfit.kernels import machine_code

CAPABILITIES: Final = (80, 86, 89, 90, 100)
"""Compute capabilities × 10 on which every kernel must compile."""

OLD_CAPABILITIES: Final = (70, 75)
"""Those on which the kernels for few tokens must."""

SHARED_MEMORY_BYTES: Final = {
    70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448,
}  # fmt: skip
"""Most shared memory that one thread block can have (CUDA C++ Programming Guide, "Technical
Specifications per Compute Capability", less the 1 KB of the system)."""


TENSOR_MEMORY_COLUMNS: Final = 512
"""Most of the tensor memory of capability 10.0 that one thread block can have (PTX ISA,
"tcgen05.alloc"). Triton compiles a kernel that asks for more to one that only traps."""


class Chip(Enum):
    """Chips that take the same tiles, by their capabilities."""

    LARGE = (80, 90)
    SMALL = (86, 89)
    """100 KB of shared memory for a thread block, where the others have 160 or more."""
    NEWEST = (100,)
    """Tensor cores keep sums in a memory of their own, and the compiler spills registers where it
    does not for the others."""


def chip_of(capability: int) -> Chip:
    """Of a capability × 10; chips that are not known take the tiles that fit everywhere."""
    return next((chip for chip in Chip if capability in chip.value), Chip.SMALL)


T = TypeVar("T")


def by_chip(choose: Callable[[Chip], T]) -> list[tuple[T, str, tuple[int, ...]]]:
    """The different tiles that chips take, each with a mark for names (none for those of large
    chips) and the capabilities that it is for."""
    chips: dict[T, list[Chip]] = {}
    for chip in Chip:
        chips.setdefault(choose(chip), []).append(chip)
    return [
        (
            tile,
            "" if Chip.LARGE in alike else " " + "/".join(chip.name.lower() for chip in alike),
            tuple(sorted(capability for chip in alike for capability in chip.value)),
        )
        for tile, alike in chips.items()
    ]


UNREADABLE: Final = (70,)
"""CUDA 13's tools disassemble these no more: widths are read from PTX."""

TENSOR_OPS: Final = r"(?<![.\w])(?:[A-Z]+MMA|mma\.sync)\b"
"""HMMA, IMMA, HGMMA, UTCHMMA, …, but not HFMA2.MMA, which loads a constant."""

WARP_SIZE: Final = 32

ALIGNED: Final = 16
"""Divisor of pointers (bytes) and of whole-number arguments that a launch finds in real models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel with everything that is fixed when it is compiled."""

    name: str
    """Of the kernel and the use, as `w4a16 decode g128`."""
    kernel: Any
    """The function under `@triton.jit`."""
    types: Mapping[str, str]
    """Triton's type of every argument that is not a constant: "*bf16", "*u8", "i32", "fp32"."""
    constants: Mapping[str, Any]
    """Value of every `tl.constexpr`, and of arguments that a launch specialises (a stride of 1)."""
    num_warps: int = 4
    num_stages: int = 3
    unaligned: frozenset[str] = frozenset()
    """Whole-number arguments that need not be multiples of 16."""
    has_dot: bool = True
    """It multiplies matrices, so that tensor cores must be used."""
    capabilities: tuple[int, ...] = CAPABILITIES
    """Where it is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What the machine code of one case for one capability tells."""

    name: str
    capability: int
    has_dot: bool
    """As the case says."""
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Local memory of a thread: above 0, registers were spilled."""
    shared_bytes: int
    """Of a thread block."""
    num_tensor_ops: int
    """Tensor-core instructions in the code."""
    tensor_columns: int
    """Of a thread block, in tensor memory; 0 where a chip has none."""
    loads: Mapping[int, int] = field(default_factory=dict)
    """Instructions that load from global memory, by bytes for each thread."""

    @property
    def shared_limit_bytes(self) -> int:
        """Most that a thread block can have on this capability."""
        return SHARED_MEMORY_BYTES[self.capability]

    @property
    def widest_load_bytes(self) -> int:
        """Bytes of a thread in the widest load."""
        return max(self.loads, default=0)


def compile_all(cases: Sequence[Case], capability: int) -> list[Compiled]:
    """Compile for one capability and read the machine code.

    Raises:
        triton.CompilationError, or another error of Triton's: the code does not compile.
        KeyError: a capability whose limits are not known here.
    """
    built = [_compile(case, capability) for case in cases]
    if capability in UNREADABLE:
        codes, loads_of = [one.asm["ptx"] for one in built], machine_code.ptx_loads
    else:
        codes = machine_code.disassemble([one.asm["cubin"] for one in built], capability)
        loads_of = machine_code.loads
    found = []
    for case, one, code in zip(cases, built, codes, strict=True):
        usage = machine_code.resource_usage(one.asm["cubin"])
        figure = partial(machine_code.figure, usage)
        found.append(
            Compiled(
                name=case.name,
                capability=capability,
                has_dot=case.has_dot,
                registers=figure("REG"),
                stack_bytes=figure("STACK") + figure("LOCAL"),
                shared_bytes=one.metadata.shared,
                num_tensor_ops=len(re.findall(TENSOR_OPS, code)),
                tensor_columns=getattr(one.metadata, "tmem_size", None) or 0,
                loads=loads_of(code),
            )
        )
    return found


def _compile(case: Case, capability: int) -> Any:
    """What Triton makes of it: `asm` with PTX and cubin, `metadata`."""
    names = case.kernel.arg_names
    specialised = {
        (index,): [["tt.divisibility", ALIGNED]]
        for index, name in enumerate(names)
        if name in case.types
        and name not in case.unaligned
        and not case.types[name].startswith("f")
    }
    signature = {name: case.types.get(name, "constexpr") for name in names}
    source = ASTSource(case.kernel, signature, dict(case.constants), specialised)
    options = {
        "num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": True,
    }  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP_SIZE), options=options)

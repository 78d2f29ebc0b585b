"""Integers of `packing.Layout.TILES`, widened in registers. For use in kernels.

A column of a tile holds four integers q of 4 or 3 bits; of each, v = q - 2^(bits - 1) is wanted in
fp16 or bf16, where it is exact. By shifts, masks and conversions that is about five instructions
for each, and memory does not leave time for so many. On a GPU with tensor cores two columns (4
bits) or four (3 bits) are widened together: q is put into the mantissa of 1024 = 0x6400 in fp16, of
128 = 0x4300 in bf16, two of them in a register, and 1024 + 2^(bits - 1) is subtracted from both
at once (Kim et al., arXiv 2211.10017, section 3). The interpreter does it the plain way.
"""

from __future__ import annotations

import triton
import triton.language as tl

W4_FP16 = tl.constexpr("""{
.reg .b32 a, b, c, d, high, middle, sixteenth, offset;
mov.b32 middle, 0x64086408;
mov.b32 sixteenth, 0x2c002c00;
mov.b32 offset, 0xd480d480;
shr.u32 high, $4, 8;
lop3.b32 a, $4, 0x000f000f, 0x64006400, 0xea;
lop3.b32 b, $4, 0x00f000f0, 0x64006400, 0xea;
lop3.b32 c, high, 0x000f000f, 0x64006400, 0xea;
lop3.b32 d, high, 0x00f000f0, 0x64006400, 0xea;
sub.rn.f16x2 $0, a, middle;
fma.rn.f16x2 $1, b, sixteenth, offset;
sub.rn.f16x2 $2, c, middle;
fma.rn.f16x2 $3, d, sixteenth, offset;
}""")
"""Two int16 columns → 4 × 2 fp16. The integers in bits 4 to 7 count sixteen times as much: 1024 +
16 q, of which a sixteenth less 72 is q - 8."""

W4_BF16 = tl.constexpr("""{
.reg .b32 a, b, c, d, s, one, offset;
mov.b32 one, 0x3f803f80;
mov.b32 offset, 0xc308c308;
lop3.b32 a, $4, 0x000f000f, 0x43004300, 0xea;
shr.u32 s, $4, 4;
lop3.b32 b, s, 0x000f000f, 0x43004300, 0xea;
shr.u32 s, $4, 8;
lop3.b32 c, s, 0x000f000f, 0x43004300, 0xea;
shr.u32 s, $4, 12;
lop3.b32 d, s, 0x000f000f, 0x43004300, 0xea;
fma.rn.bf16x2 $0, a, one, offset;
fma.rn.bf16x2 $1, b, one, offset;
fma.rn.bf16x2 $2, c, one, offset;
fma.rn.bf16x2 $3, d, one, offset;
}""")
"""The same in bf16, whose subtraction of pairs came with capability 9.0 only."""


def _w3(one: str, offset: str, magic: str, is_second: bool) -> tl.constexpr:
    """Four uint8 columns of low bits and of top bits → 4 × 4 values: (low >> 2i & 3) | top bit << 2
    in each byte, then two bytes at a time into the mantissa."""
    dtype = "f16x2" if magic.startswith("0x64") else "bf16x2"
    lines = [
        ".reg .b32 l, t, q, p, one, offset, magic;",
        f"mov.b32 one, {one};", f"mov.b32 offset, {offset};", f"mov.b32 magic, {magic};",
    ]  # fmt: skip
    for i in range(4):
        shift = i + 4 * is_second - 2
        lines += [
            f"shr.u32 t, $9, {shift};" if shift >= 0 else f"shl.b32 t, $9, {-shift};",
            "and.b32 t, t, 0x04040404;",
            f"shr.u32 l, $8, {2 * i};",
            "lop3.b32 q, l, 0x03030303, t, 0xea;",
            "prmt.b32 p, q, magic, 0x4140;",
            f"fma.rn.{dtype} ${2 * i}, p, one, offset;",
            "prmt.b32 p, q, magic, 0x4342;",
            f"fma.rn.{dtype} ${2 * i + 1}, p, one, offset;",
        ]
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


OUT4 = tl.constexpr("=&r,=&r,=&r,=&r,r")
OUT8 = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r")
W3_FP16_FIRST = _w3("0x3c003c00", "0xe404e404", "0x64646464", False)
W3_FP16_SECOND = _w3("0x3c003c00", "0xe404e404", "0x64646464", True)
W3_BF16_FIRST = _w3("0x3f803f80", "0xc304c304", "0x43434343", False)
W3_BF16_SECOND = _w3("0x3f803f80", "0xc304c304", "0x43434343", True)


@triton.jit  # type: ignore[untyped-decorator]
def field(column, top, i: tl.constexpr, half: tl.constexpr, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """v of feature i of each column, fp32, the plain way; `top` counts for 3 bits."""
    if BITS == 4:
        q = (column.to(tl.int32) >> (4 * i)) & 15
    else:
        low = (column.to(tl.int32) >> (2 * i)) & 3
        q = low | (((top.to(tl.int32) >> (4 * half + i)) & 1) << 2)
    return (q - (1 << (BITS - 1))).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _fields4(column, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if DTYPE == tl.float16:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            W4_FP16, OUT4, [column], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            W4_BF16, OUT4, [column], dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _fields3(column, top, half: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if DTYPE == tl.float16:  # noqa: SIM300
        code: tl.constexpr = W3_FP16_FIRST if half == 0 else W3_FP16_SECOND
        return tl.inline_asm_elementwise(
            code, OUT8, [column, top], dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        bf16_code: tl.constexpr = W3_BF16_FIRST if half == 0 else W3_BF16_SECOND
        return tl.inline_asm_elementwise(
            bf16_code, OUT8, [column, top],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def fields(  # type: ignore[no-untyped-def]
    column, top,
    half: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """v of the four features of each column, of DTYPE (fp16 or bf16)."""
    if not PTX:
        return (
            field(column, top, 0, half, BITS).to(DTYPE),
            field(column, top, 1, half, BITS).to(DTYPE),
            field(column, top, 2, half, BITS).to(DTYPE),
            field(column, top, 3, half, BITS).to(DTYPE),
        )
    elif BITS == 4:
        return _fields4(column, DTYPE)
    else:
        return _fields3(column, top, half, DTYPE)

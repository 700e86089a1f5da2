"""Vector arithmetic of one instruction-set row: what the kernels are written in.

All vectors have LANES lanes; LLVM splits them where the machine's are narrower. A row that lacks
an instruction gets it spelled out here and nowhere else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2, sqrt

import ml_dtypes
import numpy as np

from tokenmill.backends.llvm.emit import Function, Operand, Value, lanes_of, vector
from tokenmill.backends.llvm.target import Row
from tokenmill.ir.order import LANES

F32 = vector("float", LANES)
I32 = vector("i32", LANES)
I16 = vector("i16", LANES)
HALF = vector("half", LANES)

_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the rounded integer in the low bits
_LN2_HIGH = 0.693359375  # ln 2 in two parts, so that n * ln2 loses nothing (Cody and Waite)
_LN2_LOW = -2.12194440e-4
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
"""Cephes' polynomial for (exp(r) - 1 - r) / r^2, highest power first."""

_ERF_STEP = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
"""Of Abramowitz and Stegun 7.1.26, highest power first."""


class Lanes:
    """Emits arithmetic into one function for one row of the instruction-set table."""

    def __init__(self, function: Function, row: Row) -> None:
        self.f = function
        self.row = row

    # -- float32

    def zero(self) -> Value:
        return self.f.const(F32, 0.0)

    def splat(self, scalar: Value) -> Value:
        return self.f.splat(scalar, LANES)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a * b + c, rounded once where the row has the instruction."""
        return self.f.overloaded("fma", a, b, c) if self.row.has_fma else a * b + c

    def maximum(self, a: Value, b: Value) -> Value:
        return self.f.select(a.compare("ogt", b), a, b)

    def round_to_i32(self, x: Value) -> Value:
        """To the nearest integer, ties to even; |x| < 2^22."""
        magic = self.f.const(x.type, _MAGIC)
        bits = "i32" if lanes_of(x.type) == 1 else vector("i32", lanes_of(x.type))
        return self.f.bitcast(x + magic, bits) - self.f.bitcast(magic, bits)

    def exp(self, x: Value) -> Value:
        """e^x to about one unit in the last place; exactly 0 below -87, x at most 88."""
        f = self.f
        n = self.round_to_i32(self.maximum(x, f.const(x.type, -127.0)) * log2(2.718281828459045))
        whole = f.cast("sitofp", n, "float")
        r = self.fma(whole, f.const(x.type, -_LN2_HIGH), x)
        r = self.fma(whole, f.const(x.type, -_LN2_LOW), r)
        series = f.const(x.type, _EXP[0])
        for coefficient in _EXP[1:]:
            series = self.fma(series, r, f.const(x.type, coefficient))
        value = self.fma(series, r * r, r + 1.0)
        power = f.bitcast((n + 127) << 23, x.type)
        return f.select(x.compare("olt", -87.0), f.const(x.type, 0.0), value * power)

    def softcap(self, x: Value, cap: float) -> Value:
        """cap * tanh(x / cap), through exp(-2|x| / cap), which cannot overflow."""
        f = self.f
        power = self.exp(self.absolute(x) * (-2.0 / cap))
        one = f.const(x.type, 1.0)
        size = (one - power) / (one + power) * cap
        return f.select(x.compare("olt", 0.0), f.const(x.type, -0.0) - size, size)

    def normal_cdf(self, x: Value) -> Value:
        """Phi(x) to 1e-7, by Abramowitz and Stegun 7.1.26 for the complementary error function."""
        f = self.f
        one = f.const(x.type, 1.0)
        size = self.absolute(x) * sqrt(0.5)
        t = one / (one + size * _ERF_STEP)
        series = f.const(x.type, _ERF[0])
        for coefficient in _ERF[1:]:
            series = self.fma(series, t, f.const(x.type, coefficient))
        tail = series * t * self.exp(f.const(x.type, 0.0) - size * size) * 0.5
        return f.select(x.compare("olt", 0.0), tail, one - tail)

    def tree(self, x: Value, combine: str = "add") -> Value:
        """All lanes to one scalar by halving (order.tree_sum); `combine` is add, max or min.

        max takes floats, min signed integers.
        """
        lanes = lanes_of(x.type)
        while lanes > 1:
            lanes //= 2
            low = self.f.shuffle(x, x, range(lanes))
            high = self.f.shuffle(x, x, range(lanes, 2 * lanes))
            x = self.combined(low, high, combine)
        return self.f.extract(x, 0)

    def trees(self, vectors: Sequence[Value]) -> Value:
        """The tree of each vector, side by side: the same sums, of several vectors at once.

        Takes a power of two of vectors, LANES at most.
        """
        sums, width = list(vectors), LANES
        while len(sums) > 1 or width > 1:
            width //= 2
            others = sums if len(sums) == 1 else sums[1::2]
            pairs = zip(sums[::2], others, strict=True)
            sums = [self._halved(a, b, width) for a, b in pairs]
        return sums[0]

    def _halved(self, a: Value, b: Value, width: int) -> Value:
        """Runs of 2 * width lanes to runs of width: those of `a`, and behind them those of `b`."""
        count = lanes_of(a.type)
        lows = [i for i in range(count if a is b else 2 * count) if i % (2 * width) < width]
        low, high = (self.f.shuffle(a, b, [i + s for i in lows]) for s in (0, width))
        return low + high

    def combined(self, low: Value, high: Value, combine: str) -> Value:
        if combine == "min":
            return self.f.select(low.compare("slt", high), low, high)
        return low + high if combine == "add" else self.maximum(low, high)

    def absolute(self, x: Value) -> Value:
        return self.f.overloaded("fabs", x)

    # -- narrow types

    def half_to_f32(self, x: Value) -> Value:
        """Float16 lanes to float32, exactly."""
        f = self.f
        if self.row.has_half:
            return f.cast("fpext", x, "float")
        bits = f.cast("zext", f.bitcast(x, I16), "i32")
        magnitude = (bits & 0x7FFF) << 13
        finite = f.bitcast(f.bitcast(magnitude, F32) * 2.0**112, I32)
        is_finite = (bits & 0x7C00).compare("ne", 0x7C00)
        sign = (bits & 0x8000) << 16
        return f.bitcast(f.select(is_finite, finite, magnitude | 0x7F800000) | sign, F32)

    def bf16_to_f32(self, x: Value) -> Value:
        """16-bit lanes that hold bfloat16 to float32."""
        return self.f.bitcast(self.f.cast("zext", x, "i32") << 16, F32)

    def f32_to_bf16(self, x: Value) -> Value:
        """Float32 lanes to 16-bit lanes that hold bfloat16, to nearest even."""
        f = self.f
        if self.row.bf16_dot is not None:
            return f.bitcast(f.cast("fptrunc", x, "bfloat"), I16)
        bits = f.bitcast(x, I32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = f.select(x.compare("uno", x), f.const(I32, 0x7FC0), rounded)
        return f.cast("trunc", quiet, "i16")

    def bf16_integers(self, words: Value, *, bits: int, minus: int) -> Value:
        """A pair of bfloat16 a lane: the integers in the low bits of each half, less `minus`.

        `bits` is at most 6; what lies above those bits in a half counts nothing.
        """
        f = self.f
        if self.row.has_word_table:
            numbers = np.arange(4 * LANES) % 2**bits - minus
            table = numbers.astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
            kind = vector("i16", 2 * LANES)
            low, high = f.lanes(kind, table[: 2 * LANES]), f.lanes(kind, table[2 * LANES :])
            name = "llvm.x86.avx512.vpermi2var.hi.512"
            return f.bitcast(f.intrinsic(name, kind, low, f.bitcast(words, kind), high), I32)
        low, high = (
            f.bitcast(f.cast("sitofp", ((words >> shift) & (2**bits - 1)) - minus, "float"), I32)
            for shift in (0, 16)
        )
        return (low >> 16) | high

    # -- dots: each adds to `acc` the products of a few neighbours in k

    def dot_bf16(self, acc: Value, weights: Value, x: Value) -> Value:
        """`weights` and `x` hold a pair of bfloat16 a 32-bit lane.

        x86's instruction is a fused multiply-add of the high halves, then one of the low ones;
        so is what stands in for it, to the bit unless numbers below 2^-126 occur, which the
        instruction takes for zero. Arm's instruction rounds in its own way.
        """
        f = self.f
        if self.row.bf16_dot is not None:
            pairs = vector("bfloat", 2 * LANES)
            operands = (acc, f.bitcast(weights, pairs), f.bitcast(x, pairs))
            return self._native(_NATIVE[self.row.bf16_dot, self.row.vector_bytes], *operands)
        high = f.const(I32, -65536)
        acc = self.fma(f.bitcast(weights & high, F32), f.bitcast(x & high, F32), acc)
        return self.fma(f.bitcast(weights << 16, F32), f.bitcast(x << 16, F32), acc)

    def dot_int8(self, acc: Value, weights: Value, x: Value, *, bits: int = 8) -> Value:
        """`weights` hold four unsigned bytes a lane, below 2^bits, and `x` four signed ones.

        `acc` is int32. Integers leave nothing to round: every row gives the same.
        """
        if self.row.int8_dot is None:
            return self._spelled_out_int8(acc, weights, x)
        native = _NATIVE[self.row.int8_dot, self.row.vector_bytes]
        if self.row.int8_dot == "vpmaddubsw":
            return self._paired_int8(native, acc, weights, x, bits)
        quads = vector("i8", 4 * LANES)
        signed = self.f.bitcast(x, quads)
        if self.row.int8_dot != "sdot":
            return self._native(native, acc, self.f.bitcast(weights, quads), signed)
        # The weights are taken as signed: their top bit, which then counts -128, goes apart.
        acc = self._native(native, acc, self.f.bitcast(weights & 0x7F7F7F7F, quads), signed)
        if bits < 8:
            return acc
        top = self.f.bitcast(weights & -0x7F7F7F80, quads)
        return acc - self._native(native, self.f.const(I32, 0), top, signed)

    def _paired_int8(
        self, native: "_Native", acc: Value, weights: Value, x: Value, bits: int
    ) -> Value:
        """Sums of two products in 16 bits, then of two sums in 32.

        The first saturate at 2^15: two times 127 * 127, or 128 * 127, still fit.
        """
        f, bytes_, words = self.f, vector("i8", 4 * LANES), vector("i16", 2 * LANES)
        parts = [weights] if bits < 8 else [weights & 0x7F7F7F7F, weights & -0x7F7F7F80]
        add_up = _NATIVE["vpmaddwd", self.row.vector_bytes]
        for part in parts:
            sums = self._native(native, f.bitcast(part, bytes_), f.bitcast(x, bytes_))
            acc = acc + self._native(add_up, sums, f.const(words, 1))
        return acc

    def _spelled_out_int8(self, acc: Value, weights: Value, x: Value) -> Value:
        for byte in range(4):
            unsigned = (weights >> (8 * byte)) & 255
            signed = (x << (24 - 8 * byte)).shift_signed(24)
            acc = acc + unsigned * signed
        return acc

    def _native(self, native: "_Native", *operands: Value) -> Value:
        """An instruction on LANES lanes, in as many parts as registers are narrower than that."""
        f, made = self.f, []
        for part in range(native.parts):
            cut = [self._part(operand, part, native.parts) for operand in operands]
            kind = vector(native.element, native.lanes // native.parts)
            made.append(f.intrinsic(native.intrinsic, kind, *cut))
        while len(made) > 1:
            count = 2 * lanes_of(made[0].type)
            made = [
                f.shuffle(a, b, range(count)) for a, b in zip(made[::2], made[1::2], strict=True)
            ]
        return made[0]

    def _part(self, value: Value, part: int, parts: int) -> Value:
        size = lanes_of(value.type) // parts
        return self.f.shuffle(value, value, range(part * size, (part + 1) * size))


@dataclass(frozen=True)
class _Native:
    """An intrinsic, the lanes of its results on `parts` registers, and their type."""

    intrinsic: str
    parts: int
    lanes: int = LANES
    element: str = "i32"


_NATIVE = {
    ("vdpbf16ps", 64): _Native("llvm.x86.avx512bf16.dpbf16ps.512", 1, element="float"),
    ("bfdot", 16): _Native("llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, element="float"),
    ("vpdpbusd", 64): _Native("llvm.x86.avx512.vpdpbusd.512", 1),
    ("vpdpbusd", 32): _Native("llvm.x86.avx512.vpdpbusd.256", 2),
    ("vpmaddubsw", 64): _Native("llvm.x86.avx512.pmaddubs.w.512", 1, 2 * LANES, "i16"),
    ("vpmaddubsw", 32): _Native("llvm.x86.avx2.pmadd.ub.sw", 2, 2 * LANES, "i16"),
    ("vpmaddwd", 64): _Native("llvm.x86.avx512.pmaddw.d.512", 1),
    ("vpmaddwd", 32): _Native("llvm.x86.avx2.pmadd.wd", 2),
    ("usdot", 16): _Native("llvm.aarch64.neon.usdot.v4i32.v16i8", 4),
    ("sdot", 16): _Native("llvm.aarch64.neon.sdot.v4i32.v16i8", 4),
}
"""By instruction and bytes a register."""


def f8_to_f32(f: Function, x: Value) -> Value:
    """Bytes that hold float8 (e4m3) to float32, exactly; not its NaN.

    Sign, exponent and mantissa are put in their places, and what the two exponents start from is
    made up for by a product, which is right for subnormal numbers too.
    """
    bits = (f.cast("sext", x, "i32") << 20) & (0x87F00000 - 2**32)
    kind = "float" if lanes_of(x.type) == 1 else vector("float", lanes_of(x.type))
    return f.bitcast(bits, kind) * 2.0**120


def clamp(f: Function, value: Value, low: Operand, high: Operand) -> Value:
    """An integer between two bounds."""
    value = f.select(value.compare("slt", low), f.same(value, low), value)
    return f.select(value.compare("sgt", high), f.same(value, high), value)

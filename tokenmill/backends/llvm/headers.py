"""Headers of packed blocks: how scales and minimums lie there, and how a kernel reads them.

A plain header holds a float16 a lane for each group: all scales, then all minimums; in a Z format
the latter are zero points, a byte a lane. That of f8 holds a float32 a lane for each 128 inputs.
One of a K format holds, for each SUPER inputs, what its groups share and their factors:

    q4_k, q5_k   [64 bytes: low nibbles of the scales' factors][64: of the minimums']
                 [64: upper bits of both][scale: LANES float16][minimum: LANES float16]
                 groups 0-3 lie in the low nibbles of 16 bytes each, groups 4-7 in the high ones;
                 of a nibble of upper bits, two are the scale's and the next two the minimum's
    q6_k         [16 groups x LANES signed bytes][scale: LANES float16]

which is to the byte what ggml's blocks of LANES rows take.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tokenmill.backends.llvm.emit import Value
from tokenmill.backends.llvm.lanes import F32, HALF, Lanes
from tokenmill.ir.formats import FORMATS, SUPER, Array
from tokenmill.ir.order import GROUP, LANES

ByteArray = npt.NDArray[np.uint8]
Planes = dict[str, Array]
Scales = tuple[Value | None, Value | None]

_PLANE = 2 * LANES  # bytes of a float16 a lane
_WIDE_PLANE = 4 * LANES
_PER_SUPER = SUPER // GROUP
_BYTES = f"<{4 * LANES} x i8>"


class Reader:
    """Emits the walk over the groups of some blocks, and reads their scales on the way."""

    def __init__(self, lanes: Lanes, blocks: list[Value], groups: int) -> None:
        self.lanes = lanes
        self.f = lanes.f
        self.blocks = blocks
        self.groups = groups

    @contextmanager
    def walk(self) -> Iterator[Value]:
        """Loop over groups of GROUP inputs."""
        with self.f.loop(0, self.groups) as group:
            yield group

    def scales(self, group: Value, part: int, slot: int) -> Scales:
        """Scale and minimum of a group's part in block `slot`, as float32 lanes, where it has them.

        A format whose groups are of GROUP inputs has one part.
        """
        raise NotImplementedError

    def half(self, address: Value) -> Value:
        return self.lanes.half_to_f32(self.f.load(HALF, address, _PLANE))

    def factor(self, address: Value, extend: str) -> Value:
        small = self.f.load(f"<{LANES} x i8>", address, LANES)
        return self.f.cast("sitofp", self.f.cast(extend, small, "i32"), "float")


class Header:
    """The header of one format."""

    reader: type[Reader]

    def group_bytes(self) -> int:
        """Bytes for GROUP inputs, on the average."""
        raise NotImplementedError

    def size(self, groups: int) -> int:
        """Bytes for so many groups of GROUP inputs."""
        raise NotImplementedError

    def pack(self, planes: Planes, groups: int) -> ByteArray:
        """[blocks, size] bytes of planes [blocks, columns, LANES], named as in `Format.planes`."""
        raise NotImplementedError


class _PlainReader(Reader):
    has_minimum = False

    def scales(self, group: Value, part: int, slot: int) -> Scales:
        scale = self.half(self.blocks[slot].at(group * _PLANE))
        if not self.has_minimum:
            return scale, None
        minimums = self.blocks[slot].at(self.groups * _PLANE)
        return scale, self.half(minimums.at(group * _PLANE))


class _MinimumReader(_PlainReader):
    has_minimum = True


class _ZeroReader(_PlainReader):
    """The minimum is -scale * zero, which float32 holds exactly."""

    extend = "zext"

    def scales(self, group: Value, part: int, slot: int) -> Scales:
        scale, _ = super().scales(group, part, slot)
        assert scale is not None
        zeros = self.blocks[slot].at(self.groups * _PLANE)
        zero = self.factor(zeros.at(group * LANES), self.extend)
        return scale, (self.f.const(F32, 0.0) - zero) * scale


class _SignedZeroReader(_ZeroReader):
    extend = "sext"


class _WideReader(Reader):
    def scales(self, group: Value, part: int, slot: int) -> Scales:
        scales = self.blocks[slot].at((group >> 2) * _WIDE_PLANE)
        return self.f.load(F32, scales, _WIDE_PLANE), None


class _NoReader(Reader):
    def scales(self, group: Value, part: int, slot: int) -> Scales:
        return None, None


class _PlainHeader(Header):
    def __init__(self, num_planes: int) -> None:
        self.num_planes = num_planes
        self.reader = (_NoReader, _PlainReader, _MinimumReader)[num_planes]

    def group_bytes(self) -> int:
        return _PLANE * self.num_planes

    def size(self, groups: int) -> int:
        return groups * self.group_bytes()

    def pack(self, planes: Planes, groups: int) -> ByteArray:
        flat = [_flat_bytes(plane) for plane in planes.values()]
        return np.concatenate([*flat, np.zeros((len(flat[0]) if flat else 1, 0), np.uint8)], axis=1)


class _ZeroHeader(_PlainHeader):
    def __init__(self, *, is_signed: bool) -> None:
        self.reader = _SignedZeroReader if is_signed else _ZeroReader

    def group_bytes(self) -> int:
        return _PLANE + LANES


class _WideHeader(_PlainHeader):
    """float32 scales, each for four groups."""

    def __init__(self) -> None:
        self.reader = _WideReader

    def group_bytes(self) -> int:
        return _WIDE_PLANE // 4

    def size(self, groups: int) -> int:
        return -(-groups // 4) * _WIDE_PLANE


class _KHeader(Header):
    """A header that is made of one record for each SUPER inputs."""

    record_bytes: int

    def group_bytes(self) -> int:
        return self.record_bytes // _PER_SUPER

    def size(self, groups: int) -> int:
        return -(-groups // _PER_SUPER) * self.record_bytes


class _SixBitReader(Reader):
    """Unpacks the factors of SUPER inputs at once, onto the stack, and reads them from there.

    What they share stays in the record: it would take registers that the dots need.
    """

    def __init__(self, lanes: Lanes, blocks: list[Value], groups: int) -> None:
        super().__init__(lanes, blocks, groups)
        slots = [self.f.variable(f"<{2 * _PER_SUPER * LANES} x i8>") for _ in blocks]
        self.unpacked = [Value(self.f, slot.text, "ptr") for slot in slots]

    @contextmanager
    def walk(self) -> Iterator[Value]:
        f = self.f
        with f.loop(0, -(-self.groups // _PER_SUPER)) as record:
            for block, target in zip(self.blocks, self.unpacked, strict=True):
                self._unpack(block.at(record * _SixBitHeader.record_bytes), target)
            first = record * _PER_SUPER
            left = f.const("i64", self.groups) - first
            count = f.select(left.compare("slt", _PER_SUPER), left, _PER_SUPER)
            with f.loop(first, first + count) as group:
                yield group

    def _unpack(self, record: Value, target: Value) -> None:
        f = self.f
        scale, minimum, upper = (f.load(_BYTES, record.at(64 * i), 64) for i in range(3))
        factors = (
            (scale & 15) | ((upper << 4) & 0x30),
            ((scale >> 4) & 15) | (upper & 0x30),
            (minimum & 15) | ((upper << 2) & 0x30),
            ((minimum >> 4) & 15) | ((upper >> 2) & 0x30),
        )
        for index, part in enumerate(factors):
            f.store(part, target.at(64 * index), 64)

    def scales(self, group: Value, part: int, slot: int) -> Scales:
        record = self.blocks[slot].at((group >> 3) * _SixBitHeader.record_bytes)
        unpacked, at = self.unpacked[slot], (group & (_PER_SUPER - 1)) * LANES
        scale, minimum = (
            self.factor(unpacked.at(128 * index).at(at), "zext")
            * self.half(record.at(192 + _PLANE * index))
            for index in range(2)
        )
        return scale, minimum


class _SixBitHeader(_KHeader):
    record_bytes = 3 * 4 * LANES + 2 * _PLANE
    reader = _SixBitReader

    def pack(self, planes: Planes, groups: int) -> ByteArray:
        scale, minimum = (
            _records(planes[name], _PER_SUPER).view(np.uint8)
            for name in ("scale_factors", "minimum_factors")
        )
        low, high = slice(0, _PER_SUPER // 2), slice(_PER_SUPER // 2, None)
        upper = (scale >> 4) | (minimum >> 4 << 2)
        parts: list[Array] = [
            p[:, :, low] & 15 | p[:, :, high] << 4 for p in (scale, minimum, upper)
        ]
        parts += [_records(planes[name], 1) for name in ("scales", "minimums")]
        return np.concatenate([_flat_bytes(p, 2) for p in parts], axis=2).reshape(len(scale), -1)


class _EightBitReader(Reader):
    def scales(self, group: Value, part: int, slot: int) -> Scales:
        record = self.blocks[slot].at((group >> 3) * _EightBitHeader.record_bytes)
        at = (group & (_PER_SUPER - 1)) * (2 * LANES)
        factor = self.factor(record.at(at).at(part * LANES), "sext")
        return factor * self.half(record.at(2 * _PER_SUPER * LANES)), None


class _EightBitHeader(_KHeader):
    record_bytes = 2 * _PER_SUPER * LANES + _PLANE
    reader = _EightBitReader

    def pack(self, planes: Planes, groups: int) -> ByteArray:
        factors = _records(planes["scale_factors"], 2 * _PER_SUPER)
        parts = [factors, _records(planes["scales"], 1)]
        return np.concatenate([_flat_bytes(p, 2) for p in parts], axis=2).reshape(len(factors), -1)


def _records(plane: Array, columns: int) -> Array:
    """[blocks, columns of all, LANES] -> [blocks, records, columns, LANES], filled with zeros."""
    padded = np.pad(plane, ((0, 0), (0, -plane.shape[1] % columns), (0, 0)))
    return padded.reshape(len(plane), -1, columns, LANES)


def _flat_bytes(array: Array, keep: int = 1) -> ByteArray:
    """The bytes of an array, its first `keep` axes kept."""
    flat = np.ascontiguousarray(array).view(np.uint8)
    return flat.reshape(*array.shape[:keep], -1)


def _header_of(name: str) -> Header:
    row = FORMATS[name]
    if row.has_zero:
        return _ZeroHeader(is_signed=row.lowest < 0)
    if row.scale_dtype == np.float32:
        return _WideHeader()
    if row.factor_dtype is None:
        return _PlainHeader(int(row.has_scale) + int(row.has_minimum))
    return _SixBitHeader() if row.has_minimum else _EightBitHeader()


HEADERS = {name: _header_of(name) for name in FORMATS}
"""By weight format."""

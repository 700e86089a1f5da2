"""Conversions of half and bfloat for processors without instructions for them.

There LLVM calls functions of a compiler's run-time library, which no Python process is sure to
have loaded; so a module for such a processor brings them along, written with integers.
Round to nearest, ties to even, as the instructions do.
"""


def half_conversions_ir() -> str:
    """Definitions to append to a module; weak, so that several objects may bring them."""
    return _EXTEND_HALF + _TRUNCATE_HALF + _TRUNCATE_BFLOAT


_EXTEND_HALF = """
define weak hidden float @__extendhfsf2(half %h) nounwind {
  %bits = bitcast half %h to i16
  %wide = zext i16 %bits to i32
  %sign = and i32 %wide, 32768
  %sign.high = shl i32 %sign, 16
  %magnitude = and i32 %wide, 32767
  %moved = shl i32 %magnitude, 13
  ; as a float with exponent bias 15: 2^112 puts it right, subnormals too
  %small = bitcast i32 %moved to float
  %scaled = fmul float %small, 0x46F0000000000000
  %scaled.bits = bitcast float %scaled to i32
  %special = or i32 %moved, 2139095040
  %is_special = icmp uge i32 %magnitude, 31744
  %result = select i1 %is_special, i32 %special, i32 %scaled.bits
  %signed = or i32 %result, %sign.high
  %float = bitcast i32 %signed to float
  ret float %float
}
"""

_TRUNCATE_HALF = """
define weak hidden half @__truncsfhf2(float %x) nounwind {
  %bits = bitcast float %x to i32
  %sign = lshr i32 %bits, 16
  %sign.half = and i32 %sign, 32768
  %magnitude = and i32 %bits, 2147483647
  ; normal result: move the exponent bias, round on the 13 bits that go
  %odd = lshr i32 %magnitude, 13
  %odd.bit = and i32 %odd, 1
  %biased = add i32 %magnitude, 3355447295 ; (15 - 127) << 23, plus 0xFFF
  %rounded = add i32 %biased, %odd.bit
  %normal = lshr i32 %rounded, 13
  ; subnormal result: adding 0.5 lets the adder round to multiples of 2^-24
  %positive = bitcast i32 %magnitude to float
  %aligned = fadd float %positive, 0.5
  %aligned.bits = bitcast float %aligned to i32
  %subnormal = sub i32 %aligned.bits, 1056964608
  %is_subnormal = icmp ult i32 %magnitude, 947912704
  %finite = select i1 %is_subnormal, i32 %subnormal, i32 %normal
  %is_overflow = icmp uge i32 %magnitude, 1199566848
  %bounded = select i1 %is_overflow, i32 31744, i32 %finite
  %is_nan = icmp ugt i32 %magnitude, 2139095040
  %result = select i1 %is_nan, i32 32256, i32 %bounded
  %signed = or i32 %result, %sign.half
  %narrow = trunc i32 %signed to i16
  %half = bitcast i16 %narrow to half
  ret half %half
}
"""

_TRUNCATE_BFLOAT = """
define weak hidden bfloat @__truncsfbf2(float %x) nounwind {
  %bits = bitcast float %x to i32
  %odd = lshr i32 %bits, 16
  %odd.bit = and i32 %odd, 1
  %biased = add i32 %bits, 32767
  %rounded = add i32 %biased, %odd.bit
  %quiet = or i32 %bits, 4194304
  %is_nan = fcmp uno float %x, 0.0
  %result = select i1 %is_nan, i32 %quiet, i32 %rounded
  %high = lshr i32 %result, 16
  %narrow = trunc i32 %high to i16
  %bfloat = bitcast i16 %narrow to bfloat
  ret bfloat %bfloat
}
"""

"""What Linux says an AArch64 processor has: AT_HWCAP and AT_HWCAP2 of the auxiliary vector.

LLVM reads /proc/cpuinfo and knows a few of its names only: neither dot product nor i8mm nor bf16.
It then takes for granted what the named processor model was built with, though a hypervisor or
the kernel may have switched some of that off. So each feature here is said to be on or off.
"""

import ctypes
from collections.abc import Mapping

AT_HWCAP, AT_HWCAP2 = 16, 26  # of getauxval(3)

_BITS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "fp-armv8": ((AT_HWCAP, 0),),
    "neon": ((AT_HWCAP, 1),),
    "aes": ((AT_HWCAP, 3), (AT_HWCAP, 4)),
    "sha2": ((AT_HWCAP, 5), (AT_HWCAP, 6)),
    "crc": ((AT_HWCAP, 7),),
    "lse": ((AT_HWCAP, 8),),
    "fullfp16": ((AT_HWCAP, 9), (AT_HWCAP, 10)),
    "rdm": ((AT_HWCAP, 12),),
    "jsconv": ((AT_HWCAP, 13),),
    "complxnum": ((AT_HWCAP, 14),),
    "rcpc": ((AT_HWCAP, 15),),
    "sha3": ((AT_HWCAP, 17), (AT_HWCAP, 21)),
    "sm4": ((AT_HWCAP, 18), (AT_HWCAP, 19)),
    "dotprod": ((AT_HWCAP, 20),),
    "sve": ((AT_HWCAP, 22),),
    "fp16fml": ((AT_HWCAP, 23),),
    "lse2": ((AT_HWCAP, 25),),
    "rcpc-immo": ((AT_HWCAP, 26),),
    "flagm": ((AT_HWCAP, 27),),
    "sve2": ((AT_HWCAP2, 1),),
    "altnzcv": ((AT_HWCAP2, 7),),
    "fptoint": ((AT_HWCAP2, 8),),
    "i8mm": ((AT_HWCAP2, 13),),
    "bf16": ((AT_HWCAP2, 14),),
    "sme": ((AT_HWCAP2, 23),),
    "cssc": ((AT_HWCAP2, 34),),
    "sve2p1": ((AT_HWCAP2, 36),),
    "sme2": ((AT_HWCAP2, 37),),
    "mops": ((AT_HWCAP2, 43),),
}
"""LLVM's name of what its code generator may use unasked, and all the bits that it takes: those of
arch/arm64/include/uapi/asm/hwcap.h in Linux."""


def read_words() -> dict[int, int]:
    """The two words by their key. Raises AttributeError on a libc without getauxval."""
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return {key: int(getauxval(key)) for key in (AT_HWCAP, AT_HWCAP2)}


def features_of(words: Mapping[int, int]) -> dict[str, bool]:
    """Each feature that is known here, and whether those words have all of its bits."""
    return {name: all(words[key] >> bit & 1 for key, bit in bits) for name, bits in _BITS.items()}

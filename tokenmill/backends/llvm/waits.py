"""How a native thread waits for a word in memory to change. No other file knows a futex.

A wait spins for some microseconds with the processor's pause instruction, because that is how
soon the word usually changes, and then sleeps in the kernel, since whoever should change the
word may be waiting for this very processor. It never yields: on a busy machine sched_yield hands
a stranger its whole time slice, thousands of microseconds, where a sleeper is woken at once.

A word is an i32 with the count of its sleepers, an i32, right behind it, so that waking nobody
costs no system call. Functions of libc are called through the control block and never named in
the code: their addresses differ from one process to the next, and the code is cached on disk.
"""

import ctypes
import platform
import struct
import sys
from dataclasses import dataclass

from tokenmill.backends.llvm.target import host_arch

SPINS = 0  # i32: turns of the spin loop in a barrier
IDLE_SPINS = 4  # i32: ... of a worker that waits for a step
REPLY_SPINS = 8  # i32: ... of the thread that waits for the workers
SLEEP_FUNCTION = 16  # ptr: syscall on Linux, usleep elsewhere
SLEEP_NUMBER = 24  # i64: number of the futex system call; elsewhere, microseconds to sleep
"""Offsets of the fields at the head of the control block, which belong to this file."""


@dataclass(frozen=True, kw_only=True)
class WaitConfig:
    """How long each kind of wait spins before it sleeps, in microseconds.

    With as many workers as processors, every spin takes time from whoever prepares the work;
    the thread that waits for a whole step, milliseconds away, therefore hardly spins.
    """

    barrier_spin_us: float = 30.0
    idle_spin_us: float = 5.0
    reply_spin_us: float = 2.0


def wait_fields(config: WaitConfig, spins_per_us: float) -> bytes:
    """The head of a control block, for this process only."""
    times_us = (config.barrier_spin_us, config.idle_spin_us, config.reply_spin_us)
    spins = [max(1, round(time_us * spins_per_us)) for time_us in times_us]
    libc = ctypes.CDLL(None)
    sleep = libc.syscall if _has_futex() else libc.usleep
    number = _FUTEX_NUMBERS[platform.machine()] if _has_futex() else _NAP_US
    address = ctypes.cast(sleep, ctypes.c_void_p).value
    return struct.pack("=IIIxxxxQq", *spins, address, number)


def waits_ir() -> str:
    """Internal functions, for modules to include:

    - `wait_while_equal(ptr control, ptr word, i32 value)`: returns once the word differs; what
      was written before it changed is then visible.
    - `publish(ptr control, ptr word, i32 value)`: make earlier writes visible, set, wake.
    - `wake_all(ptr control, ptr word)`: for words that change in another way; call it after.
    - `wait_for(ptr control, ptr word, i32 value, i32 spins)`, with turns of one's own choice.
    - `i1 spin_while_equal(ptr word, i32 value, i32 spins)`: whether it changed meanwhile.
    """
    declaration, pause = _PAUSES.get(host_arch(), ("", ""))
    sleep, wake = (_FUTEX_WAIT, _FUTEX_WAKE) if _has_futex() else (_NAP, "")
    return declaration + _ENTRIES + _wake_ir(wake) + _spin_ir(pause) + _sleep_ir(sleep)


def _has_futex() -> bool:
    return sys.platform == "linux" and platform.machine() in _FUTEX_NUMBERS


_FUTEX_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "loongarch64": 98, "ppc64le": 221}
_NAP_US = 50

_PAUSES = {
    "x86_64": ("declare void @llvm.x86.sse2.pause()\n", "call void @llvm.x86.sse2.pause()"),
    # Arm's `yield` does nothing on a core that is no pair of threads; a barrier of instructions
    # holds the loop up for some tens of cycles, as x86's pause does.
    "aarch64": ("declare void @llvm.aarch64.isb(i32)\n", "call void @llvm.aarch64.isb(i32 15)"),
}

_FUTEX_WAIT = (
    "%slept = call i64 (i64, ...) %function(i64 %number, ptr %word, i32 128, i32 %value, "
    "ptr null, ptr null, i32 0) ; FUTEX_WAIT_PRIVATE"
)
_FUTEX_WAKE = (
    "%woken = call i64 (i64, ...) %function(i64 %number, ptr %word, i32 129, i32 2147483647, "
    "ptr null, ptr null, i32 0) ; FUTEX_WAKE_PRIVATE, everybody"
)
_NAP = """%microseconds = trunc i64 %number to i32
  %slept = call i32 %function(i32 %microseconds)"""

_ENTRIES = f"""
define internal void @wait_while_equal(ptr %control, ptr %word, i32 %value) alwaysinline nounwind {{
  %spins.at = getelementptr i8, ptr %control, i64 {SPINS}
  %spins = load i32, ptr %spins.at
  call void @wait_for(ptr %control, ptr %word, i32 %value, i32 %spins)
  ret void
}}

define internal void @wait_for(ptr %control, ptr %word, i32 %value, i32 %spins)
    alwaysinline nounwind {{
entry:
  %changed = call i1 @spin_while_equal(ptr %word, i32 %value, i32 %spins)
  br i1 %changed, label %done, label %give_up
give_up:
  call void @wait_asleep(ptr %control, ptr %word, i32 %value)
  br label %done
done:
  ret void
}}

define internal void @publish(ptr %control, ptr %word, i32 %value) alwaysinline nounwind {{
  store atomic i32 %value, ptr %word release, align 4
  call void @wake_all(ptr %control, ptr %word)
  ret void
}}
"""


# Who sleeps counts itself, then compares the word; who wakes changes the word, then reads the
# count. All of it is in one total order (seq_cst), so one of the two sees the other.
def _wake_ir(wake: str) -> str:
    return f"""
define internal void @wake_all(ptr %control, ptr %word) alwaysinline nounwind {{
entry:
  fence seq_cst
  %sleepers = getelementptr i8, ptr %word, i64 4
  %count = load atomic i32, ptr %sleepers seq_cst, align 4
  %nobody = icmp eq i32 %count, 0
  br i1 %nobody, label %done, label %wake
wake:
  %function.at = getelementptr i8, ptr %control, i64 {SLEEP_FUNCTION}
  %function = load ptr, ptr %function.at
  %number.at = getelementptr i8, ptr %control, i64 {SLEEP_NUMBER}
  %number = load i64, ptr %number.at
  {wake}
  br label %done
done:
  ret void
}}
"""


def _spin_ir(pause: str) -> str:
    return f"""
define internal i1 @spin_while_equal(ptr %word, i32 %value, i32 %spins) alwaysinline nounwind {{
entry:
  br label %look
look:
  %turn = phi i32 [ 0, %entry ], [ %turn.next, %spin ]
  %now = load atomic i32, ptr %word acquire, align 4
  %changed = icmp ne i32 %now, %value
  %spent = icmp uge i32 %turn, %spins
  %ends = or i1 %changed, %spent
  br i1 %ends, label %done, label %spin
spin:
  {pause}
  %turn.next = add i32 %turn, 1
  br label %look
done:
  ret i1 %changed
}}
"""


def _sleep_ir(sleep: str) -> str:
    return f"""
define internal void @wait_asleep(ptr %control, ptr %word, i32 %value) cold noinline nounwind {{
entry:
  %function.at = getelementptr i8, ptr %control, i64 {SLEEP_FUNCTION}
  %function = load ptr, ptr %function.at
  %number.at = getelementptr i8, ptr %control, i64 {SLEEP_NUMBER}
  %number = load i64, ptr %number.at
  %sleepers = getelementptr i8, ptr %word, i64 4
  %before = atomicrmw add ptr %sleepers, i32 1 seq_cst, align 4
  br label %look
look:
  %seen = load atomic i32, ptr %word seq_cst, align 4
  %still = icmp eq i32 %seen, %value
  br i1 %still, label %sleep, label %get_up
sleep:
  {sleep}
  br label %look
get_up:
  %after = atomicrmw sub ptr %sleepers, i32 1 seq_cst, align 4
  ret void
}}
"""

"""Threads that run compiled steps. Each enters native code once and stays there until `close`.

The control block is how they meet. Each word that threads wait for has cache lines of its own.
"""

import ctypes
import math
import os
import threading
import time
import weakref
from typing import Any

from tokenmill.backends.llvm import cgroup
from tokenmill.backends.llvm.compile import LoadedObject, compile_object, load_object
from tokenmill.backends.llvm.memory import Arena
from tokenmill.backends.llvm.objects import ObjectCache, cache_key
from tokenmill.backends.llvm.target import Row
from tokenmill.backends.llvm.waits import (
    IDLE_SPINS,
    REPLY_SPINS,
    WaitConfig,
    wait_fields,
    waits_ir,
)
from tokenmill.errors import CapacityError

# The control block; offset 0 belongs to waits.py. A word is i32 value, i32 sleepers.
STEP = 128  # word: number of the last step posted
DONE = 256  # word: number of the last step finished
FINISHED = 384  # i32: workers that have finished the step in flight
ARRIVED = 512  # i32: threads that have come to the barrier
GENERATION = 640  # word: barriers passed
PROGRAM = 768  # ptr: void program(ptr context, i32 thread, i32 num_threads)
CONTEXT = 776  # ptr
IS_STOPPING = 784  # i32
CONTROL_SIZE = 1024


def num_usable_threads() -> int:
    """Processors that affinity and our control group's quota let this process use; at least 1."""
    processors = len(usable_processors())
    quota = cgroup.cpu_quota()
    # Rounded down: a worker that is throttled keeps all others waiting at the next barrier.
    return processors if quota is None else max(1, min(processors, math.floor(quota)))


def usable_processors() -> list[int]:
    """Numbers of the processors that the calling thread may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def barrier_ir() -> str:
    """The functions of `waits_ir` and `barrier(ptr control, i32 num_threads)`, all internal.

    A program calls `barrier` between phases, with the address `Workers.control_address`: what
    any thread wrote before it, every thread sees after it. One thread passes for free.
    """
    return waits_ir() + _BARRIER


class Workers:
    """`num_threads` native workers that run one posted program at a time.

    They end with `close`, or when this is collected, or with the interpreter. A forked child
    has no workers and must make its own. Raises CapacityError if the system refuses a thread.
    """

    def __init__(
        self,
        num_threads: int,
        row: Row,
        *,
        waits: WaitConfig | None = None,
        cache: ObjectCache | None = None,
    ) -> None:
        self.num_threads = num_threads
        runtime = _Runtime(_load_runtime(row, cache))
        control = Arena(CONTROL_SIZE, huge=False)
        spins_per_us = runtime.spins_per_us(control.address)
        fields = wait_fields(waits or WaitConfig(), spins_per_us)
        control.buffer(0, len(fields))[:] = fields
        self.control_address = control.address
        self._crew = _Crew(runtime, control, num_threads)
        self._finalizer = weakref.finalize(self, self._crew.end)

    def post(self, program: int, context: int) -> None:
        """Start `program(context, thread, num_threads)` on every worker and return at once.

        Both are addresses, and what they point at must live until `wait` returns.
        """
        if not self.is_done():
            raise RuntimeError("a step is in flight already: wait for it first")
        self._crew.runtime.post(self.control_address, program, context)

    def is_done(self) -> bool:
        """Whether no step is in flight; what it wrote is then visible."""
        self._check_open()
        return bool(self._crew.runtime.is_done(self.control_address))

    def wait(self) -> None:
        """Return when no step is in flight. Other Python threads run meanwhile."""
        # Who lets go of the GIL must queue for it again: not for a step that is over.
        if not self.is_done():
            self._crew.runtime.wait(self.control_address)

    def publish(self, word: int, value: int) -> None:
        """Set a word (its address; i32, sleepers behind it) that a program waits for."""
        self._check_open()
        self._crew.runtime.publish(self.control_address, word, value)

    def close(self) -> None:
        """End the workers, after the step in flight; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the workers are closed")
        if self._crew.process_id != os.getpid():
            raise RuntimeError("workers do not survive a fork: make new ones in the child")


class _Crew:
    """The threads and all they stand on; knows nothing of `Workers`, which can so be collected."""

    def __init__(self, runtime: "_Runtime", control: Arena, num_threads: int) -> None:
        self.runtime = runtime
        self.control = control
        self.process_id = os.getpid()
        # Daemons, since the interpreter joins others before it would run our finalizer.
        self.threads = [
            threading.Thread(
                target=_work,
                args=(runtime, control, thread, num_threads),
                name=f"tokenmill-worker-{thread}",
                daemon=True,
            )
            for thread in range(num_threads)
        ]
        for started, thread in enumerate(self.threads):
            try:
                thread.start()
            except RuntimeError as error:  # what Python raises when the system refuses
                del self.threads[started:]
                self.end()
                raise CapacityError(
                    f"the system lets this process start {started} of {num_threads} threads: "
                    "choose fewer, or raise its limit of tasks"
                ) from error

    def end(self) -> None:
        if self.process_id != os.getpid():
            return
        # A worker that left in the middle of a step would keep the others at a barrier.
        self.runtime.wait(self.control.address)
        self.runtime.stop(self.control.address)
        for thread in self.threads:
            thread.join()
        # The block itself stays as long as we do: another thread may still be leaving `wait`.


def _work(runtime: "_Runtime", control: Arena, thread: int, num_threads: int) -> None:
    processors = usable_processors()
    if len(processors) == num_threads and hasattr(os, "sched_setaffinity"):
        # One each, or the kernel puts two workers on one as soon as anybody else wants to run.
        # With processors to spare it is left alone: others may have been given the same ones.
        os.sched_setaffinity(0, {processors[thread]})
    runtime.work(control.address, thread, num_threads)


class _Runtime:
    """The native functions. Those that cannot block keep the GIL, which makes them cheap."""

    def __init__(self, code: LoadedObject) -> None:
        self._code = code
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        blocking, brief = ctypes.CFUNCTYPE, ctypes.PYFUNCTYPE
        self.work = self._bind(blocking, "worker_main", None, pointer, number, number)
        self.wait = self._bind(blocking, "wait_done", None, pointer)
        self.spin = self._bind(brief, "spin", None, pointer, number)
        self.post = self._bind(brief, "post", None, pointer, pointer, pointer)
        self.stop = self._bind(brief, "stop", None, pointer)
        self.is_done = self._bind(brief, "is_done", number, pointer)
        self.publish = self._bind(brief, "publish_word", None, pointer, pointer, number)

    def _bind(self, kind: Any, name: str, result: Any, *arguments: Any) -> Any:
        return kind(result, *arguments)(self._code.address(name))

    def spins_per_us(self, control: int) -> float:
        """Turns of the spin loop in a microsecond: the best of a few, some 50 us each."""
        return max(self._timed_spin(control, 1000) for _ in range(3))

    def _timed_spin(self, control: int, turns: int) -> float:
        start_ns = time.perf_counter_ns()
        self.spin(control, turns)
        return turns * 1000 / (time.perf_counter_ns() - start_ns)


def _load_runtime(row: Row, cache: ObjectCache | None) -> LoadedObject:
    def build() -> bytes:
        return compile_object(barrier_ir() + _RUNTIME, row)

    if cache is None:
        return load_object(build())
    return load_object(cache.get_or_build(cache_key("workers", row=row), build))


_BARRIER = f"""
define internal void @barrier(ptr %control, i32 %num_threads) nounwind {{
entry:
  %alone = icmp eq i32 %num_threads, 1
  br i1 %alone, label %done, label %arrive
arrive:
  %generation = getelementptr i8, ptr %control, i64 {GENERATION}
  %arrived = getelementptr i8, ptr %control, i64 {ARRIVED}
  ; read before arriving: the generation cannot end without us
  %current = load atomic i32, ptr %generation acquire, align 4
  %before = atomicrmw add ptr %arrived, i32 1 acq_rel, align 4
  %others = sub i32 %num_threads, 1
  %is_last = icmp eq i32 %before, %others
  br i1 %is_last, label %open, label %wait
wait:
  call void @wait_while_equal(ptr %control, ptr %generation, i32 %current)
  br label %done
open:
  store atomic i32 0, ptr %arrived monotonic, align 4
  %next = add i32 %current, 1
  call void @publish(ptr %control, ptr %generation, i32 %next)
  br label %done
done:
  ret void
}}
"""

_RUNTIME = f"""
define void @worker_main(ptr %control, i32 %thread, i32 %num_threads) nounwind {{
entry:
  %step = getelementptr i8, ptr %control, i64 {STEP}
  %done = getelementptr i8, ptr %control, i64 {DONE}
  %finished = getelementptr i8, ptr %control, i64 {FINISHED}
  %is_stopping.at = getelementptr i8, ptr %control, i64 {IS_STOPPING}
  %program.at = getelementptr i8, ptr %control, i64 {PROGRAM}
  %context.at = getelementptr i8, ptr %control, i64 {CONTEXT}
  %spins.at = getelementptr i8, ptr %control, i64 {IDLE_SPINS}
  %spins = load i32, ptr %spins.at
  %others = sub i32 %num_threads, 1
  br label %next
next:
  %last = phi i32 [ 0, %entry ], [ %number, %run ], [ %number, %report ]
  call void @wait_for(ptr %control, ptr %step, i32 %last, i32 %spins)
  %number = load atomic i32, ptr %step acquire, align 4
  %is_stopping = load i32, ptr %is_stopping.at
  %stops = icmp ne i32 %is_stopping, 0
  br i1 %stops, label %stop, label %run
run:
  %program = load ptr, ptr %program.at
  %context = load ptr, ptr %context.at
  call void %program(ptr %context, i32 %thread, i32 %num_threads)
  %before = atomicrmw add ptr %finished, i32 1 acq_rel, align 4
  %is_last = icmp eq i32 %before, %others
  br i1 %is_last, label %report, label %next
report:
  store atomic i32 0, ptr %finished monotonic, align 4
  call void @publish(ptr %control, ptr %done, i32 %number)
  br label %next
stop:
  ret void
}}

define void @post(ptr %control, ptr %program, ptr %context) nounwind {{
  %step = getelementptr i8, ptr %control, i64 {STEP}
  %program.at = getelementptr i8, ptr %control, i64 {PROGRAM}
  %context.at = getelementptr i8, ptr %control, i64 {CONTEXT}
  store ptr %program, ptr %program.at
  store ptr %context, ptr %context.at
  %last = load atomic i32, ptr %step monotonic, align 4
  %number = add i32 %last, 1
  call void @publish(ptr %control, ptr %step, i32 %number)
  ret void
}}

define void @stop(ptr %control) nounwind {{
  %step = getelementptr i8, ptr %control, i64 {STEP}
  %is_stopping.at = getelementptr i8, ptr %control, i64 {IS_STOPPING}
  store i32 1, ptr %is_stopping.at
  %last = load atomic i32, ptr %step monotonic, align 4
  %number = add i32 %last, 1
  call void @publish(ptr %control, ptr %step, i32 %number)
  ret void
}}

define i32 @is_done(ptr %control) nounwind {{
  %step = getelementptr i8, ptr %control, i64 {STEP}
  %done = getelementptr i8, ptr %control, i64 {DONE}
  %posted = load atomic i32, ptr %step monotonic, align 4
  %finished = load atomic i32, ptr %done acquire, align 4
  %same = icmp eq i32 %posted, %finished
  %result = zext i1 %same to i32
  ret i32 %result
}}

define void @wait_done(ptr %control) nounwind {{
  %step = getelementptr i8, ptr %control, i64 {STEP}
  %done = getelementptr i8, ptr %control, i64 {DONE}
  %spins.at = getelementptr i8, ptr %control, i64 {REPLY_SPINS}
  %spins = load i32, ptr %spins.at
  %posted = load atomic i32, ptr %step monotonic, align 4
  %before = sub i32 %posted, 1
  call void @wait_for(ptr %control, ptr %done, i32 %before, i32 %spins)
  ret void
}}

define void @publish_word(ptr %control, ptr %word, i32 %value) nounwind {{
  call void @publish(ptr %control, ptr %word, i32 %value)
  ret void
}}

define void @spin(ptr %control, i32 %turns) nounwind {{
  %done = getelementptr i8, ptr %control, i64 {DONE}
  %number = load atomic i32, ptr %done monotonic, align 4
  %changed = call i1 @spin_while_equal(ptr %done, i32 %number, i32 %turns)
  ret void
}}
"""

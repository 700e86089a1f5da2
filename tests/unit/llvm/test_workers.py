import ctypes
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from tokenmill.backends.llvm.compile import compile_object, load_object
from tokenmill.backends.llvm.objects import ObjectCache
from tokenmill.backends.llvm.target import pick_row
from tokenmill.backends.llvm.waits import WaitConfig
from tokenmill.backends.llvm.workers import Workers, barrier_ir
from tokenmill.errors import CapacityError

# Context: control, phases, errors, a word to wait for, then a place of 64 bytes per thread.
# `phases`: each thread dawdles for a random time, writes the phase's number, passes the
# barrier, checks everybody's number, passes again.
PROGRAMS = """
define void @phases(ptr %context, i32 %thread, i32 %num_threads) {
entry:
  %control = load ptr, ptr %context
  %phases.at = getelementptr i64, ptr %context, i64 1
  %phases = load i64, ptr %phases.at
  %errors = getelementptr i64, ptr %context, i64 2
  %wide = zext i32 %thread to i64
  %offset = shl i64 %wide, 6
  %places = getelementptr i64, ptr %context, i64 8
  %mine = getelementptr i8, ptr %places, i64 %offset
  br label %phase
phase:
  %number = phi i64 [ 1, %entry ], [ %number.next, %phase.end ]
  %random = phi i64 [ %wide, %entry ], [ %random.next, %phase.end ]
  %multiplied = mul i64 %random, 6364136223846793005
  %random.next = add i64 %multiplied, 1442695040888963407
  %high = lshr i64 %random.next, 33
  %choice = and i64 %high, 15
  %is_long = icmp eq i64 %choice, 0
  %turns.mask = select i1 %is_long, i64 1023, i64 15
  %middle = lshr i64 %random.next, 40
  %turns = and i64 %middle, %turns.mask
  br label %dawdle
dawdle:
  %turn = phi i64 [ 0, %phase ], [ %turn.next, %dawdle ]
  %other.errors = load volatile i64, ptr %errors
  %turn.next = add i64 %turn, 1
  %dawdles = icmp ult i64 %turn, %turns
  br i1 %dawdles, label %dawdle, label %write
write:
  store i64 %number, ptr %mine
  call void @barrier(ptr %control, i32 %num_threads)
  br label %check
check:
  %peer = phi i32 [ 0, %write ], [ %peer.next, %check ]
  %peer.wide = zext i32 %peer to i64
  %peer.offset = shl i64 %peer.wide, 6
  %theirs = getelementptr i8, ptr %places, i64 %peer.offset
  %seen = load i64, ptr %theirs
  %is_wrong = icmp ne i64 %seen, %number
  %wrong = zext i1 %is_wrong to i64
  %ignored = atomicrmw add ptr %errors, i64 %wrong monotonic
  %peer.next = add i32 %peer, 1
  %checks = icmp ult i32 %peer.next, %num_threads
  br i1 %checks, label %check, label %phase.end
phase.end:
  call void @barrier(ptr %control, i32 %num_threads)
  %number.next = add i64 %number, 1
  %goes = icmp ule i64 %number.next, %phases
  br i1 %goes, label %phase, label %done
done:
  ret void
}

define void @mark(ptr %context, i32 %thread, i32 %num_threads) {
  %wide = zext i32 %thread to i64
  %offset = shl i64 %wide, 6
  %places = getelementptr i64, ptr %context, i64 8
  %mine = getelementptr i8, ptr %places, i64 %offset
  %old = load i64, ptr %mine
  %new = add i64 %old, 1
  store i64 %new, ptr %mine
  ret void
}

define void @wait_for_word(ptr %context, i32 %thread, i32 %num_threads) {
  %control = load ptr, ptr %context
  %word = getelementptr i64, ptr %context, i64 3
  call void @wait_while_equal(ptr %control, ptr %word, i32 0)
  call void @barrier(ptr %control, i32 %num_threads)
  call void @mark(ptr %context, i32 %thread, i32 %num_threads)
  ret void
}
"""

NEVER_SPIN = WaitConfig(barrier_spin_us=0, idle_spin_us=0, reply_spin_us=0)


@pytest.fixture(scope="module")
def programs():
    return load_object(compile_object(barrier_ir() + PROGRAMS, pick_row()))


class Context:
    def __init__(self, workers: Workers) -> None:
        self.words = np.zeros(8 + 8 * workers.num_threads, np.int64)
        self.words[0] = workers.control_address
        self.address = self.words.ctypes.data

    @property
    def marks(self) -> list[int]:
        return [int(x) for x in self.words[8::8]]


def start(num_threads: int, waits: WaitConfig | None = None) -> tuple[Workers, Context]:
    workers = Workers(num_threads, pick_row(), waits=waits)
    return workers, Context(workers)


@pytest.mark.parametrize(
    ("num_threads", "waits", "phases"),
    [
        (1, None, 100_000),
        (2, None, 100_000),
        (3, None, 2_000),  # more threads than many a machine has processors
        (2, NEVER_SPIN, 5_000),  # every wait sleeps, so a wake-up that is lost hangs
        (5, NEVER_SPIN, 2_000),
    ],
)
def test_what_was_written_before_a_barrier_is_seen_after_it(programs, num_threads, waits, phases):
    workers, context = start(num_threads, waits)
    with workers:
        context.words[1] = phases
        workers.post(programs.address("phases"), context.address)
        workers.wait()
        assert context.words[2] == 0
        assert context.marks == [phases] * num_threads


@pytest.mark.parametrize("waits", [None, NEVER_SPIN])
def test_every_worker_runs_every_step_once(programs, waits):
    workers, context = start(3, waits)
    with workers:
        for step in range(1, 501):
            workers.post(programs.address("mark"), context.address)
            workers.wait()
            assert workers.is_done()
            assert context.marks == [step] * 3


def test_waiting_leaves_other_python_threads_running_and_publish_ends_it(programs):
    workers, context = start(2)
    with workers:
        workers.post(programs.address("wait_for_word"), context.address)
        waiting = threading.Thread(target=workers.wait)
        waiting.start()
        time.sleep(0.05)
        assert not workers.is_done()
        assert waiting.is_alive()
        workers.publish(context.address + 24, 1)
        waiting.join(20)
        assert not waiting.is_alive()
        assert context.marks == [1, 1]


def test_idle_workers_use_no_processor_time(programs):
    workers, context = start(2)
    with workers:
        workers.post(programs.address("mark"), context.address)
        workers.wait()
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1


def test_a_second_step_in_flight_is_refused(programs):
    workers, context = start(2)
    with workers:
        workers.post(programs.address("wait_for_word"), context.address)
        with pytest.raises(RuntimeError, match="in flight"):
            workers.post(programs.address("mark"), context.address)
        workers.publish(context.address + 24, 1)
        workers.wait()


def test_waiting_for_nothing_returns():
    workers, _ = start(2)
    with workers:
        workers.wait()


def test_close_lets_the_step_in_flight_finish_and_may_be_called_again(programs):
    workers, context = start(2)
    context.words[1] = 3_000
    workers.post(programs.address("phases"), context.address)
    workers.close()
    assert context.marks == [3_000, 3_000]
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.post(programs.address("mark"), context.address)
    with pytest.raises(RuntimeError, match="closed"):
        workers.wait()


def test_workers_that_nobody_holds_end():
    workers, _ = start(2)
    threads = [t for t in threading.enumerate() if t.name.startswith("tokenmill-worker")]
    assert len(threads) == 2
    del workers
    assert not any(t.is_alive() for t in threads)


def test_a_forked_child_can_leave_and_cannot_post(programs):
    workers, context = start(2)
    with workers:
        child = os.fork()
        if child == 0:
            code = 3
            try:
                workers.post(programs.address("mark"), context.address)
            except RuntimeError:
                workers.close()
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        workers.post(programs.address("mark"), context.address)
        workers.wait()
        assert context.marks == [1, 1]


@pytest.mark.parametrize("ending", ["pass", "raise SystemExit(0)", "workers.wait()"])
def test_the_interpreter_leaves_without_close(ending):
    script = (
        "from tokenmill.backends.llvm.target import pick_row\n"
        "from tokenmill.backends.llvm.workers import Workers\n"
        f"workers = Workers(2, pick_row())\n{ending}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def affinities() -> list[set[int]]:
    threads = [t for t in threading.enumerate() if t.name.startswith("tokenmill-worker")]
    return [os.sched_getaffinity(t.native_id) for t in threads if t.native_id]


def test_workers_that_fill_the_machine_have_a_processor_each(programs):
    everything = os.sched_getaffinity(0)
    workers, context = start(len(everything))
    with workers:
        workers.post(programs.address("mark"), context.address)
        workers.wait()
        assert sorted(affinities(), key=min) == [{p} for p in sorted(everything)]
        assert os.sched_getaffinity(0) == everything
    workers, context = start(len(everything) + 1)
    with workers:
        workers.post(programs.address("mark"), context.address)
        workers.wait()
        assert affinities() == [everything] * (len(everything) + 1)


def test_the_native_loop_comes_from_the_cache(tmp_path, programs, monkeypatch):
    cache = ObjectCache(tmp_path)
    Workers(2, pick_row(), cache=cache).close()
    monkeypatch.setattr("tokenmill.backends.llvm.workers.compile_object", None)
    with Workers(2, pick_row(), cache=cache) as workers:
        context = Context(workers)
        workers.post(programs.address("mark"), context.address)
        workers.wait()
        assert context.marks == [1, 1]


def test_portable_code_meets_at_the_same_barrier():
    row = pick_row("portable")
    loaded = load_object(compile_object(barrier_ir() + PROGRAMS, row))
    with Workers(2, row) as workers:
        context = Context(workers)
        context.words[1] = 1_000
        workers.post(loaded.address("phases"), context.address)
        workers.wait()
        assert context.words[2] == 0


def test_addresses_of_libc_are_not_in_the_code():
    """The object is cached on disk and loaded into processes that lie elsewhere."""
    data = compile_object(barrier_ir() + PROGRAMS, pick_row())
    libc = ctypes.CDLL(None)
    address = ctypes.cast(libc.syscall, ctypes.c_void_p).value
    assert address is not None
    assert address.to_bytes(8, "little") not in data
    assert b"syscall" not in data


def test_without_a_futex_waits_take_naps(monkeypatch):
    monkeypatch.setattr("tokenmill.backends.llvm.waits._has_futex", lambda: False)
    loaded = load_object(compile_object(barrier_ir() + PROGRAMS, pick_row()))
    workers, context = start(3, NEVER_SPIN)
    with workers:
        context.words[1] = 50
        workers.post(loaded.address("phases"), context.address)
        workers.wait()
        assert context.words[2] == 0
        assert context.marks == [50] * 3


def test_a_thread_that_the_system_refuses_is_a_readable_error(monkeypatch):
    start, alive = threading.Thread.start, threading.active_count()

    def start_two(thread: threading.Thread) -> None:
        if thread.name.endswith("worker-2"):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(CapacityError, match=r"start 2 of 5 threads: choose fewer"):
        Workers(5, pick_row())
    assert threading.active_count() == alive

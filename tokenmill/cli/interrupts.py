"""Ctrl-C while an answer is coming: a wish to stop the answer, not the program."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupt:
    """Whether the user has pressed Ctrl-C."""

    is_set = False


@contextmanager
def watch_interrupts() -> Iterator[Interrupt]:
    """Inside, the first Ctrl-C only sets the flag; a second one raises KeyboardInterrupt.

    An exception at an arbitrary point would leave the engine's caller in an unknown state, so
    whoever reads the stream looks at the flag between two tokens.
    """
    interrupt = Interrupt()

    def handle(signum: int, frame: FrameType | None) -> None:
        if interrupt.is_set:
            raise KeyboardInterrupt
        interrupt.is_set = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)

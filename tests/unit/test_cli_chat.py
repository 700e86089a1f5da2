"""The chat on a terminal of its own, and through a pipe."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = [sys.executable, str(Path(__file__).with_name("fake_llm.py")), "chat"]
CTRL_C, CTRL_D = b"\x03", b"\x04"
TIMEOUT_S = 30


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments):
        self._master, slave = pty.openpty()
        self._seen = b""
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            close_fds=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"},
        )
        os.close(slave)

    def type(self, keys):
        os.write(self._master, keys)

    def expect(self, text):
        """Read until `text` shows; what comes after it is kept for the next time."""
        deadline = time.monotonic() + TIMEOUT_S
        while text not in self._seen:
            ready, _, _ = select.select([self._master], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} does not come after {self._seen!r}"
            try:
                self._seen += os.read(self._master, 4096)
            except OSError:  # how Linux says that the other side is closed
                pytest.fail(f"{text!r} does not come, the end is {self._seen!r}")
        before, _, self._seen = self._seen.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def _take_terminal():
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal():
    terminal = Terminal()
    terminal.expect(b">>> ")
    yield terminal
    terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal):
    terminal.type(b"endless\n")
    terminal.expect(b"<u:endless>..")
    terminal.type(CTRL_C)
    terminal.expect(b"(stopped)")
    terminal.expect(b">>> ")
    terminal.type(b"/reset\n")
    terminal.expect(b">>> ")
    terminal.type(b"still here\n")
    terminal.expect(b"<u:still here>")
    terminal.expect(b">>> ")
    terminal.type(CTRL_D)
    terminal.expect(b"[aborted 1, closed True]")
    assert terminal.process.wait(TIMEOUT_S) == 0


def test_ctrl_c_at_the_prompt_gives_a_new_one(terminal):
    terminal.type(b"half a li")
    terminal.expect(b"half a li")  # the prompt comes a little before what is typed is read
    terminal.type(CTRL_C)
    terminal.expect(b"(/exit or Ctrl-D leaves)")
    terminal.expect(b">>> ")
    terminal.type(b"/exit\n")
    assert terminal.process.wait(TIMEOUT_S) == 0


def test_an_answer_that_was_stopped_belongs_to_the_history(terminal):
    terminal.type(b"endless\n")
    terminal.expect(b"<u:endless>..")
    terminal.type(CTRL_C)
    terminal.expect(b">>> ")
    terminal.type(b"next\n")
    terminal.expect(b"<u:endless|a:<u:endless>..")


def test_arrow_up_recalls_the_line_before(terminal):
    terminal.type(b"hello\n")
    terminal.expect(b"<u:hello>")
    terminal.expect(b">>> ")
    terminal.type(b"/reset\n")
    terminal.expect(b">>> ")
    terminal.type(b"\x1b[A\x1b[A\n")
    terminal.expect(b"<u:hello>")


def chat(text, *arguments):
    return subprocess.run(
        [*PROGRAM, *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def test_a_pipe_gets_the_answers_and_nothing_else():
    done = chat("one\ntwo\n")
    assert done.returncode == 0
    assert done.stdout == "<u:one>\n<u:one|a:<u:one>|u:two>\n"


def test_system_message(tmp_path):
    done = chat("one\n/system be brief\ntwo\n/system\nthree\n", "--system", "be kind")
    assert done.stdout == "<s:be kind|u:one>\n<s:be brief|u:two>\n<u:three>\n"


def test_unknown_commands_show_what_there_is():
    done = chat("/what\n/exit\nnever read\n")
    assert done.stdout == ""
    assert "/reset" in done.stderr
    assert done.returncode == 0


def test_a_message_that_is_too_long_is_refused_and_the_chat_goes_on():
    done = chat("x" * 20_000 + "\nshort\n")
    assert "error: the message has 20002 tokens" in done.stderr
    assert done.stdout == "<u:short>\n"
    assert done.returncode == 0

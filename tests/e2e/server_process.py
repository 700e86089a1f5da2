"""`tokenmill serve` as a user starts it: a process of its own, which ends with a SIGTERM."""

import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from openai import OpenAI

from tests.e2e.command import PROGRAM, environment

READY = re.compile(r"ready: (http://\S+)")


@dataclass
class ServerProcess:
    """A server that takes requests; `lines` is what it said on standard error so far."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def terminate(self) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def read(self, is_ready: threading.Event) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            if found := READY.match(line):
                self.url = found[1]
                is_ready.set()
        is_ready.set()


@contextmanager
def serving(model: Path, home: Path, *flags: str, **settings: str) -> Iterator[ServerProcess]:
    process = subprocess.Popen(
        [*PROGRAM, "serve", str(model), "--port", "0", *flags],
        env=environment(home, **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    server, is_ready = ServerProcess(process), threading.Event()
    reader = threading.Thread(target=server.read, args=(is_ready,))
    reader.start()
    try:
        assert is_ready.wait(180)
        assert server.url, "\n".join(server.lines)
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(20)


def strict_client(url: str, api_key: str) -> OpenAI:
    """The official client, which refuses an answer that is not as its types say."""
    return OpenAI(
        base_url=f"{url}/v1",
        api_key=api_key,
        max_retries=0,
        timeout=60,
        _strict_response_validation=True,
    )

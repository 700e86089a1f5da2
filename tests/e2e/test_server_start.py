"""How `tokenmill serve` starts, and what it says where it cannot."""

import socket
from pathlib import Path

import pytest

from tests.e2e.command import assert_refused, run_command


@pytest.fixture
def taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def test_a_port_in_use(tmp_path: Path, taken_port: int) -> None:
    done = run_command("serve", "--port", str(taken_port), home=tmp_path)
    assert_refused(done, 2, f"port {taken_port}", "in use")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (("--host", "no.such.host.invalid"), ("no.such.host.invalid",)),
        (("--host", "192.0.2.1"), ("192.0.2.1", "not an address of this machine")),
        (("--port", "70000"), ("70000", "65535")),
        (("--api-key-file", "nowhere"), ("nowhere", "No such file")),
        (("--api-key", "two words"), ("ASCII",)),
        (("--drain-timeout", "-1"), ("drain_timeout_s",)),
        (("--max-num-seqs", "0"), ("max_num_seqs",)),
        (("--model", "nope", "--offline"), ("nope",)),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, flags, fragments) -> None:
    assert_refused(run_command("serve", "--port", "0", *flags, home=tmp_path), 2, *fragments)


def test_key_files(tmp_path: Path) -> None:
    for content, fragment in (
        (b"", "holds no key"),
        (b"# only\n\n", "holds no key"),
        (b"\xff", "text"),
    ):
        file = tmp_path / "keys"
        file.write_bytes(content)
        done = run_command("serve", "--port", "0", "--api-key-file", str(file), home=tmp_path)
        assert_refused(done, 2, str(file), fragment)

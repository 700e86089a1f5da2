"""`tokenmill collectives bench`: a table, an object, and words for what is wrong."""

import json

import pytest

from tests.unit.collectives.test_collectives_cli import run

QUICK = ("--max-size", "64", "--num-iters", "1", "--num-rounds", "1", "--no-gloo")


def test_a_table(capsys):
    code, out, err = run(capsys, "bench", "--ranks", "2", *QUICK)
    assert (code, err) == (0, "")
    head, *lines = out.splitlines()
    assert head.split()[:4] == ["bytes", "count", "type", "algorithm"]
    assert "gloo" not in head
    assert [line.split()[:3] for line in lines] == [["8", "2", "f32"], ["64", "16", "f32"]]
    assert all(line.split()[-1] == "0" for line in lines), "errors"


def test_an_object(capsys):
    arguments = ("--op", "all-to-all", "--dtype", "bf16", "--transport", "sockets", "--json")
    code, out, _ = run(capsys, "bench", *arguments, *QUICK)
    assert code == 0
    document = json.loads(out)
    assert (document["op"], document["ranks"]) == ("all_to_all", 2)
    first = document["rows"][0]
    assert (first["num_bytes"], first["count"], first["num_wrong"]) == (8, 4, 0)
    assert first["busbw"] == pytest.approx(first["algbw"] / 2)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--op", "barrier"), "--op is barrier, but must be one of all_reduce"),
        (("--op", "sum"), "--op is 'sum'"),
        (("--ranks", "0"), "--ranks is 0, but must be at least 1"),
        (("--num-iters", "0"), "--num-iters is 0"),
        (("--num-rounds", "-1"), "--num-rounds is -1"),
        (("--factor", "1"), "--factor is 1, but must be at least 2"),
        (("--dtype", "f8"), "f8"),
        (("--min-size", "big"), "'big' is no size"),
        (("--min-size", "1M", "--max-size", "1K"), "--min-size is above --max-size"),
        (("--timeout", "0"), "--timeout is 0 s"),
        (("--timeout", "nan"), "--timeout is nan s"),
    ],
)
def test_bad_arguments(capsys, arguments, text):
    code, out, err = run(capsys, "bench", *arguments)
    assert (code, out) == (2, "")
    assert text in err
    assert err.count("\n") == 1


def test_a_rank_that_fails(capsys):
    code, out, err = run(capsys, "bench", "--timeout", "0.000001", *QUICK)
    assert (code, out) == (1, "")
    assert "rank" in err
    assert err.count("\n") == 1


def test_over_torch_without_torch(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, "bench", "--transport", "torch")
    assert code == 2
    assert "pip install 'tokenmill[torch]'" in err


def test_over_mpi_without_mpi4py(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    code, _, err = run(capsys, "bench", "--transport", "mpi")
    assert code == 2
    assert "pip install 'tokenmill[mpi]'" in err

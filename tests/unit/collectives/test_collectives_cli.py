"""`tokenmill collectives`: tables, objects, pictures, and words for what is wrong."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from tokenmill.cli.main import main
from tokenmill.collectives.text import parse


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(["collectives", *arguments])
    out, err = capsys.readouterr()
    return exited.value.code, out, err


def texts(path):
    tree = ElementTree.parse(path)
    return [element.text for element in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_a_table(capsys):
    code, out, err = run(capsys, "simulate", "--op", "allreduce", "--ranks", "8", "--hosts", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "all_reduce of 64 KiB, 8 ranks on 2 hosts"
    ring = next(line for line in lines if line.startswith("ring "))
    assert ring.split()[1:5] == ["1", "14", "112", "KiB"]
    assert "every rank" in ring
    assert lines[-1].startswith("The tuner takes: all_reduce of 64 KiB by ")


def test_24576_ranks(capsys):
    arguments = ("--ranks", "24576", "--hosts", "4096", "--algorithms", "ring", "hierarchical")
    code, out, _ = run(capsys, "simulate", "--op", "all-reduce", *arguments, "--json")
    assert code == 0
    document = json.loads(out)
    rows = {row["algorithm"]: row for row in document["algorithms"]}
    assert rows["ring"]["num_steps"] == 49_150
    assert rows["hierarchical"]["num_steps"] == 8_200
    assert all(row["source"] == "one host for all" for row in rows.values())
    assert rows["ring"]["nccl_latency_s"] == pytest.approx(63.1e-3, rel=1e-3)
    last = document["over_ranks"]["hierarchical"][-1]
    assert (last["ranks"], last["steps"]) == (24_576, 8_200)


def test_every_rank_and_as_many_slices_as_are_best(capsys, monkeypatch):
    monkeypatch.setattr("tokenmill.collectives.simulate._FEW_STEPS", 0)
    arguments = ("--ranks", "64", "--hosts", "8", "--size", "4M", "--json", "--algorithms")
    _, out, _ = run(capsys, "simulate", *arguments, "hierarchical", "tree")
    rows = {row["algorithm"]: row for row in json.loads(out)["algorithms"]}
    assert rows["tree"]["slices"] > 1
    assert rows["hierarchical"]["source"] == "one host for all"
    _, out, _ = run(capsys, "simulate", *arguments, "hierarchical", "--every-rank")
    (row,) = json.loads(out)["algorithms"]
    assert row.pop("source") == "every rank"
    assert row["time_s"] == pytest.approx(rows["hierarchical"]["time_s"])


def test_formulas_and_simulation_of_all(capsys):
    for flag, source in (("--formulas", {"formula"}), ("--simulate-all", {"every rank"})):
        _, out, _ = run(capsys, "simulate", "--ranks", "6", "--json", flag)
        assert {row["source"] for row in json.loads(out)["algorithms"]} == source


@pytest.mark.parametrize(
    "op", ["reduce", "broadcast", "allgather", "reduce-scatter", "alltoall", "send_recv", "barrier"]
)
def test_every_operation(capsys, op):
    for action in ("simulate", "explain"):
        code, out, err = run(capsys, action, "--op", op, "--ranks", "4")
        assert (code, err) == (0, "")
        assert op.replace("-", "").replace("_", "") in out.replace("_", "")


def test_a_picture_of_sizes_and_ranks(capsys, tmp_path):
    path = tmp_path / "study.svg"
    code, _, err = run(capsys, "simulate", "--ranks", "64", "--hosts", "8", "--plot", str(path))
    assert (code, err) == (0, f"saved {path}\n")
    words = texts(path)
    assert words[0] == "all_reduce over 64 ranks on 8 hosts"
    assert {"ring", "tree", "torus", "Time, us", "Steps on the way of 64 KiB"} <= set(words)


def test_a_schedule(capsys, tmp_path):
    path = tmp_path / "ring.svg"
    arguments = ("--op", "all_reduce", "--algorithm", "ring", "--ranks", "3", "--svg", str(path))
    code, out, _ = run(capsys, "explain", *arguments)
    assert code == 0
    assert out.startswith(
        "all_reduce by ring, 3 ranks of 3 elements: proved\n"
        "4 steps, 12 messages, at most 4 elements sent by a rank\n"
        "\n"
        "at the start\n"
        "            rank 0  rank 1  rank 2\n"
        "    part 0  0       1       2\n"
        "    part 1  0       1       2\n"
        "    part 2  0       1       2\n"
        "\n"
        "step 1\n"
        "  0 -> 1: part 2, added\n"
        "  1 -> 2: part 0, added\n"
        "  2 -> 0: part 1, added\n"
        "            rank 0  rank 1  rank 2\n"
        "    part 0  0       1       1-2\n"
    )
    assert out.endswith("    part 2  0-2     0-2     0-2\n")
    words = texts(path)
    assert words.count("0-2") == 9 + 6 + 3  # after the last step, the one before, and step 2
    assert {"start", "step 4", "rank 2"} <= set(words)


def test_sums_in_order_are_pointed_out(capsys):
    _, out, _ = run(capsys, "explain", "--algorithm", "two_shot", "--ranks", "3")
    assert "; every sum in order of rank\n" in out


def test_a_program_to_read(capsys):
    _, out, _ = run(capsys, "explain", "--algorithm", "leader", "--hosts", "2", "--program")
    assert parse(out).plan.hosts == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "--op", "allsum"], "--op is 'allsum', but must be one of all_reduce, "),
        (["simulate", "--ranks", "10", "--hosts", "4"], "10 ranks cannot be spread evenly over 4"),
        (["simulate", "--ranks", "0"], "0 ranks"),
        (["simulate", "--slices", "0"], "--slices is 0, but must be at least 1"),
        (["simulate", "--size", "much"], "'much' is no size: give bytes such as 8, 64K"),
        (["simulate", "--size", "0"], "a size is 0, but must be at least one byte"),
        (["simulate", "--links", "fast"], "--links is 'fast', but must be gpu, cpu or a JSON file"),
        (["simulate", "--links", "none.json"], "cannot read none.json"),
        (["simulate", "--uplinks", "0"], "--uplinks is 0, but must be at least 1"),
        (["simulate", "--algorithms", "star"], "has no algorithm 'star': give some of ring, "),
        (
            ["simulate", "--algorithms", "torus", "--width", "3"],
            "8 ranks cannot stand in rows of 3",
        ),
        (["explain", "--algorithm", "star"], "has no algorithm 'star': give one of ring, "),
        (["explain", "--ranks", "64"], "a schedule of more than 16 cannot be read"),
        (["explain", "--op", "reduce", "--root", "4"], "root is 4, but ranks are 0 to 3"),
        (["explain", "--slices", "0"], "slices is 0, but must be at least 1"),
    ],
)
def test_bad_input(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_too_large_a_case(capsys):
    arguments = ("--ranks", "24576", "--algorithms", "one_shot", "--simulate-all")
    code, _, err = run(capsys, "simulate", *arguments)
    assert code == 1
    assert "too many to simulate: take fewer ranks" in err

"""What the benchmarks print and decide, with a peer and without one."""

import json
from argparse import Namespace

import pytest

from benchmarks.common import Figure, Series, compare, report


def series(*values: float) -> Series:
    return Series(values=list(values), others=[0.01] * len(values))


def figure(*ours: float, peer: Series | None = None, **options) -> Figure:
    return Figure(name="decode", unit="tok/s", ours=series(*ours), peer=peer, **options)


def test_a_row_without_a_peer_has_no_ratio():
    assert figure(2.0, 3.0, 4.0, target=1.8).row() == [
        "decode, tok/s",
        "3 (2..4)",
        "-",
        "-",
        ">= 1.8",
        "1%",
    ]


def test_a_row_with_a_peer_shows_the_median_and_the_span_of_the_pairs_ratios():
    row = figure(2.0, 3.0, 8.0, peer=series(1.0, 1.0, 2.0), target=1.8).row()
    assert row[1:5] == ["3 (2..8)", "1 (1..2)", "3.00 (2.00..4.00)", ">= 1.8 met"]


def test_others_is_the_worst_sample_of_both_sides():
    peer = Series(values=[1.0, 1.0], others=[0.0, 0.25])
    assert figure(2.0, 2.0, peer=peer).row()[5] == "25%"


@pytest.mark.parametrize(("target", "is_met"), [(1.9, True), (2.0, True), (2.1, False)])
def test_a_relative_target_is_one_for_the_median_ratio(target, is_met):
    with_peer = figure(2.0, 4.0, 40.0, peer=series(1.0, 2.0, 2.0), target=target)
    assert with_peer.is_met is is_met
    assert figure(2.0, 4.0, 40.0, target=target).is_met is None


@pytest.mark.parametrize("peer", [None, series(9.0, 9.0, 9.0)])
@pytest.mark.parametrize(("target", "is_met"), [(0.5, False), (0.6, True), (0.7, True)])
def test_an_absolute_target_is_one_for_our_seconds(target, is_met, peer):
    assert figure(0.5, 0.6, 0.9, peer=peer, target=target, is_relative=False).is_met is is_met


def test_without_a_target_nothing_is_met_or_missed():
    both = figure(1.0, peer=series(1.0))
    assert both.is_met is None
    assert both.row()[4] == ""


@pytest.mark.parametrize("has_peer", [False, True])
def test_a_comparison_is_measured_and_reported(has_peer, tmp_path, capsys):
    args = Namespace(repeats=2, patience=0, threads=1, json=tmp_path / "results.json")
    theirs = (lambda: 2.0) if has_peer else None
    found = compare("decode", "tok/s", lambda: 4.0, theirs, args=args, target=1.8)
    report([found], args)
    lines = capsys.readouterr().out.splitlines()
    assert ("2.00 (2.00..2.00)" in lines[-1]) is has_peer
    [kept] = json.loads(args.json.read_text())["figures"]
    assert kept["ratios"] == ([2.0, 2.0] if has_peer else [])
    assert kept["is_met"] is (True if has_peer else None)


def test_a_missed_target_is_the_exit_code(capsys):
    args = Namespace(threads=1, json=None)
    with pytest.raises(SystemExit) as ended:
        report([figure(1.0, peer=series(1.0), target=1.8)], args)
    assert ended.value.code == 1
    assert "missed" in capsys.readouterr().out

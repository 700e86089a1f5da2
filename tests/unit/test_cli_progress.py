import sys

import pytest

from tokenmill.cli import progress
from tokenmill.models.sources.growth import Meter, folder_size, watch_growth


def test_short_work_is_not_mentioned(capsys):
    for teller in (progress.LineProgress(), progress.TerminalProgress()):
        with teller.task("loading", 100) as task:
            task.advance(100)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_a_line_now_and_then_in_a_log_file(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE_S", -1)
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", -1)
    with progress.LineProgress().task("fetching x", 3_000_000) as task:
        task.advance(1_000_000)
        task.advance(2_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "fetching x: 1.0 MB of 3.0 MB",
        "fetching x: 3.0 MB of 3.0 MB",
    ]


@pytest.mark.parametrize("total_bytes", [3_000_000, None])
def test_long_work_is_a_bar_on_a_terminal(capsys, monkeypatch, total_bytes):
    monkeypatch.setattr(progress, "PATIENCE_S", -1)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress.TerminalProgress().task("fetching [x]", total_bytes) as task:
        task.advance(1_000_000)
        task.advance(2_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert "fetching [x]" in err


def test_a_file_gets_lines(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    assert isinstance(progress.make_progress(), progress.LineProgress)


class Counter:
    def __init__(self):
        self.steps = []

    def advance(self, num_bytes):
        self.steps.append(num_bytes)


def test_a_meter_never_goes_back_nor_past_the_end():
    counter = Counter()
    meter = Meter(counter, 100)
    for reached in (10, 5, 80, 300, 90):
        meter.reach(reached)
    assert counter.steps == [10, 0, 70, 20, 0]


def test_growth_of_a_folder_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenmill.models.sources.growth.POLL_INTERVAL_S", 0.001)
    (tmp_path / "old").write_bytes(bytes(50))
    counter = Counter()
    with watch_growth(tmp_path, Meter(counter, None), 7):
        (tmp_path / "new").write_bytes(bytes(100))
        while sum(counter.steps) < 107:
            pass
    assert sum(counter.steps) == 107
    assert folder_size(tmp_path) == 150

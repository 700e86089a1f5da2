"""A picture of a run as one SVG file: how latencies are distributed, and the rate over time."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokenmill.loadgen.metrics import (
    METRICS,
    concurrency_steps,
    latencies_ms,
    percentile,
    tokens_per_second,
)
from tokenmill.loadgen.records import RequestRecord
from tokenmill.svg import document, segment, text

WIDTH, HEIGHT = 960, 640
_MAX_POINTS = 400
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A rectangle of the picture with its own axes, which begin at 0."""

    left: float
    top: float
    width: float
    height: float
    title: str
    x_max: float
    y_max: float
    x_unit: str

    def frame(self) -> list[str]:
        """Title, axes, grid and labels."""
        right, bottom = self.left + self.width, self.top + self.height
        parts = [text(self.left, self.top - 8, self.title, "title")]
        for value in _ticks(self.x_max):
            x = self._x(value)
            parts.append(segment(x, self.top, x, bottom, "grid"))
            label = f"{value:g}"
            parts.append(text(x, bottom + 15, label, "note", anchor="middle"))
        parts.append(text(right, bottom + 30, self.x_unit, "note", anchor="end"))
        for value in _ticks(self.y_max):
            y = self._y(value)
            parts.append(segment(self.left, y, right, y, "grid"))
            parts.append(text(self.left - 5, y + 4, f"{value:g}", "note", anchor="end"))
        parts.append(segment(self.left, bottom, right, bottom, "axis"))
        parts.append(segment(self.left, self.top, self.left, bottom, "axis"))
        return parts

    def line(self, points: Points, style: str = "line") -> str:
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        return f'<polyline class="{style}" points="{path}"/>'

    def mark(self, value: float, label: str, row: int) -> list[str]:
        """An upright line at `value`; its label, in a row of its own, goes where there is room."""
        x = self._x(value)
        is_right = x > self.left + self.width / 2
        shift, anchor = (-4, "end") if is_right else (4, "start")
        y = self.top + self.height - 6 - 16 * row
        return [
            segment(x, self.top, x, self.top + self.height, "mark"),
            text(x + shift, y, label, "note", anchor=anchor),
        ]

    def _x(self, value: float) -> float:
        return self.left + self.width * min(1.0, value / self.x_max)

    def _y(self, value: float) -> float:
        return self.top + self.height * (1 - min(1.0, value / self.y_max))


def draw_run(records: Sequence[RequestRecord], title: str) -> str:
    """The SVG: four distributions, output tokens a second, and requests under way."""
    parts = [text(40, 28, title, "title")]
    values = latencies_ms(records)
    for index, metric in enumerate(METRICS):
        left, top = 60 + 470 * (index % 2), 66 + 190 * (index // 2)
        parts += _distribution(METRICS[metric], values[metric], left, top)
    parts += _timeline(records)
    body = "\n".join(parts)
    return document(WIDTH, HEIGHT, title, body)


def cumulative(values: Iterable[float]) -> Points:
    """(value, share of values at most as large) at evenly spread shares, ends included."""
    ordered = sorted(values)
    count = min(len(ordered), _MAX_POINTS)
    ranks = [max(1, round((i + 1) * len(ordered) / count)) for i in range(count)]
    return [(ordered[0], 0.0), *((ordered[r - 1], r / len(ordered)) for r in ranks)]


def _distribution(name: str, values: Sequence[float], left: float, top: float) -> list[str]:
    x_max = max(values, default=0.0) or 1.0
    panel = Panel(left, top, 400, 120, f"{name}: share of values below", x_max, 1.0, "ms")
    parts = panel.frame()
    if values:
        parts.append(panel.line(cumulative(values)))
        for row, percent in enumerate((99, 50)):
            value = percentile(values, percent)
            parts += panel.mark(value, f"p{percent} {value:,.1f}", row)
    return parts


def _timeline(records: Sequence[RequestRecord]) -> list[str]:
    rates = tokens_per_second(records)
    steps = concurrency_steps(records)
    x_max = max([float(len(rates)), *(at_s for at_s, _ in steps[-1:])]) or 1.0
    top = 66 + 190 * 2
    rate_panel = Panel(
        60, top, 400, 120, "Output tokens per second", x_max, max(rates, default=0.0) or 1.0, "s"
    )
    busy_panel = Panel(
        530,
        top,
        400,
        120,
        "Requests under way",
        x_max,
        max([1, *(count for _, count in steps)]),
        "s",
    )
    parts = rate_panel.frame() + busy_panel.frame()
    parts.append(rate_panel.line(_stairs(list(enumerate(rates)), float(len(rates)))))
    parts.append(busy_panel.line(_stairs(_thin(steps), x_max), "line second"))
    return parts


def _stairs(steps: Sequence[tuple[float, float]], end: float) -> Points:
    """Corners of a line that holds each value until the next."""
    points: list[tuple[float, float]] = []
    for index, (x, y) in enumerate(steps):
        until = steps[index + 1][0] if index + 1 < len(steps) else end
        points += [(x, y), (until, y)]
    return points


def _thin(steps: Sequence[tuple[float, int]]) -> list[tuple[float, float]]:
    stride = max(1, len(steps) // (4 * _MAX_POINTS))
    return [(at_s, float(count)) for at_s, count in steps[::stride]]


def _ticks(greatest: float) -> list[float]:
    """Round values from 0 to `greatest`, about five."""
    power = 10.0 ** len(str(int(greatest))) if greatest >= 1 else 1.0
    steps = [power * s for s in (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)]
    steps += [power * s for s in (0.1, 0.2, 0.5, 1)]
    step = next((s for s in steps if greatest / s <= 5), steps[-1])
    return [step * index for index in range(int(greatest / step + 1e-9) + 1)]

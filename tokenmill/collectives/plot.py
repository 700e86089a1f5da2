"""Pictures of a study: time over size, steps and time over ranks, both axes logarithmic."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

from tokenmill import svg

WIDTH, HEIGHT = 1180, 470
_COLOURS = (
    *("#2563eb", "#d97706", "#16a34a", "#dc2626", "#9333ea"),
    *("#0891b2", "#db2777", "#65a30d", "#78716c", "#4f46e5"),
)
_STYLE = (
    svg.STYLE
    + ".series { fill: none; stroke-width: 1.8 } .faint { stroke-opacity: .25 }\n"
    + "".join(
        f".c{i} {{ stroke: {colour}; color: {colour} }} .d{i} {{ fill: {colour} }}\n"
        for i, colour in enumerate(_COLOURS)
    )
)
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class LogPanel:
    """A rectangle of the picture; both axes are logarithmic and reach over whole decades."""

    left: float
    top: float
    width: float
    height: float
    title: str
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_unit: str

    def frame(self) -> list[str]:
        """Title, grid and labels."""
        bottom, right = self.top + self.height, self.left + self.width
        parts = [svg.text(self.left, self.top - 10, self.title, "title")]
        for value in _decades(*self.x_range):
            parts.append(svg.segment(self.x(value), self.top, self.x(value), bottom, "grid"))
            parts.append(svg.text(self.x(value), bottom + 15, _label(value), "note", "middle"))
        for value in _decades(*self.y_range):
            parts.append(svg.segment(self.left, self.y(value), right, self.y(value), "grid"))
            parts.append(svg.text(self.left - 5, self.y(value) + 4, _label(value), "note", "end"))
        parts.append(svg.text(right, bottom + 32, self.x_unit, "note", "end"))
        parts.append(svg.segment(self.left, bottom, right, bottom, "axis"))
        parts.append(svg.segment(self.left, self.top, self.left, bottom, "axis"))
        return parts

    def line(self, points: Points, colour: int) -> str:
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points if y > 0)
        return f'<polyline class="series c{colour}" points="{path}"/>'

    def dot(self, x: float, y: float, colour: int) -> str:
        return f'<circle class="d{colour}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3.5"/>'

    def x(self, value: float) -> float:
        return self.left + self.width * _share(value, self.x_range)

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - _share(value, self.y_range))


def draw_study(
    title: str,
    *,
    over_sizes: Mapping[str, Points],
    over_ranks: Mapping[str, Sequence[tuple[int, int, float]]],
    simulated: Sequence[tuple[str, float, float]],
    size: str,
) -> str:
    """The SVG. Times in seconds; lines are formulas, dots (algorithm, bytes, seconds) simulated."""
    colours = {name: index % len(_COLOURS) for index, name in enumerate(over_sizes)}
    times = {name: [(x, t * 1e6) for x, t in points] for name, points in over_sizes.items()}
    steps = {n: [(float(p), float(s)) for p, s, _ in points] for n, points in over_ranks.items()}
    later = {n: [(float(p), t * 1e6) for p, _, t in points] for n, points in over_ranks.items()}
    dots = [(name, x, t * 1e6) for name, x, t in simulated]
    parts = [svg.text(40, 28, title, "title"), *_legend(colours)]
    parts += _panel(60, "Time, us", times, "bytes", colours, dots)
    parts += _panel(450, f"Steps on the way of {size}", steps, "ranks", colours)
    parts += _panel(840, f"Time for {size}, us", later, "ranks", colours)
    return svg.document(WIDTH, HEIGHT, title, "\n".join(parts), style=_STYLE)


def _panel(
    left: float,
    title: str,
    series: Mapping[str, Points],
    x_unit: str,
    colours: Mapping[str, int],
    dots: Sequence[tuple[str, float, float]] = (),
) -> list[str]:
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points] + [y for _, _, y in dots]
    panel = LogPanel(
        left=left,
        top=110,
        width=310,
        height=300,
        title=title,
        x_range=_range(xs),
        y_range=_range(ys),
        x_unit=x_unit,
    )
    lines = [panel.line(points, colours[name]) for name, points in series.items()]
    marks = [panel.dot(x, y, colours[name]) for name, x, y in dots if x > 0 and y > 0]
    return panel.frame() + lines + marks


def _legend(colours: Mapping[str, int]) -> list[str]:
    parts = []
    left = 40.0
    for name, colour in colours.items():
        parts.append(svg.segment(left, 54, left + 18, 54, f"series c{colour}"))
        parts.append(svg.text(left + 23, 58, name, "note"))
        left += 40 + 7 * len(name)
    parts.append(svg.text(40, 78, "lines: by formula; dots: simulated", "note"))
    return parts


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Whole decades around the values above 0."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = floor(log10(min(positive))), ceil(log10(max(positive)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = log10(span[0]), log10(span[1])
    return (log10(max(value, span[0])) - low) / (high - low)


def _decades(low: float, high: float) -> list[float]:
    first, last = round(log10(low)), round(log10(high))
    stride = 1 if last - first <= 6 else 2
    return [10.0**power for power in range(first, last + 1, stride)]


def _label(value: float) -> str:
    power = round(log10(value))
    if 0 <= power <= 3:
        return str(10**power)
    for unit, least in (("G", 9), ("M", 6), ("k", 3)):
        if power >= least:
            return f"{10 ** (power - least)}{unit}"
    return f"{value:g}"

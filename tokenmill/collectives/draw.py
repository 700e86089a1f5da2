"""The schedule of a small program, as text and as a picture."""

from collections.abc import Iterator, Sequence

from tokenmill import svg
from tokenmill.collectives.trace import Frame, Sent, Trace

_CELL_W, _CELL_H, _GAP, _LEFT = 64.0, 18.0, 26.0, 92.0
_ARROWS = 46.0
"""Height of the band in which messages are drawn."""
_STYLE = (
    svg.STYLE
    + """
.cell { stroke: currentColor; stroke-opacity: .25; fill: #2563eb }
.arrow { fill: none; stroke: #d97706; stroke-width: 1.4 } .copy { stroke: #16a34a }
.tip { fill: #d97706 } .tip.copy { fill: #16a34a; stroke: none }
.what { font-size: 10px } .held { font-size: 10px }
"""
)


def draw_text(trace: Trace) -> str:
    """Each step: its messages, then a table of what the ranks hold, a column each."""
    lines: list[str] = []
    for frame in trace.frames:
        lines.append("at the start" if frame.number == 0 else f"step {frame.number}")
        lines += [f"  {_message_words(trace, sent)}" for sent in frame.messages]
        lines += [f"    {line}" for line in _table(trace, frame)]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _message_words(trace: Trace, sent: Sent) -> str:
    how = "added" if sent.is_reduced else "copied"
    if trace.program.task.op == "barrier":
        return f"{sent.source} -> {sent.target}"
    elements = "1 element" if sent.count == 1 else f"{sent.count} elements"
    what = f" {_numbers(sent.parts)}" if sent.parts else f" {elements}"
    return f"{sent.source} -> {sent.target}:{what}, {how}"


def _numbers(parts: Sequence[int]) -> str:
    """`part 3`, `parts 0-2, 5`."""
    spans: list[list[int]] = []
    for part in parts:
        if spans and spans[-1][1] == part - 1:
            spans[-1][1] = part
        else:
            spans.append([part, part])
    words = ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
    return f"part {words}" if len(parts) == 1 else f"parts {words}"


def _table(trace: Trace, frame: Frame) -> Iterator[str]:
    head = ["", *(f"rank {rank}" for rank in range(len(frame.holdings)))]
    rows = [head]
    for part in range(len(frame.holdings[0])):
        name = "heard of" if trace.program.task.op == "barrier" else f"part {part}"
        rows.append([name, *(_holders(held[part]) for held in frame.holdings)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _holders(ranks: frozenset[int]) -> str:
    """`0-3`, `1+4`; a dot for nothing."""
    if not ranks:
        return "."
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def draw_svg(trace: Trace, title: str) -> str:
    """A band for each step: arrows for messages, and under each rank what it holds after them."""
    num_ranks, num_parts = len(trace.frames[0].holdings), len(trace.frames[0].holdings[0])
    width = max(560.0, _LEFT + num_ranks * (_CELL_W + _GAP) + 20)
    parts = [svg.text(20, 26, title, "title")]
    note = "orange: added on arrival; green: copied; cells: whose contributions are in"
    parts.append(svg.text(20, 44, note, "note"))
    top = 62.0
    for frame in trace.frames:
        parts += _frame(trace, frame, top)
        top += _ARROWS + num_parts * _CELL_H + 26
    return svg.document(width, top, title, "\n".join(parts), style=_STYLE)


def _frame(trace: Trace, frame: Frame, top: float) -> list[str]:
    name = "start" if frame.number == 0 else f"step {frame.number}"
    cells_top = top + _ARROWS
    parts = [svg.text(20, cells_top - 6, name, "title")]
    for rank, held in enumerate(frame.holdings):
        parts.append(svg.text(_middle(rank), cells_top - 4, f"rank {rank}", "note", "middle"))
        for part, ranks in enumerate(held):
            parts += _cell(rank, cells_top + part * _CELL_H, ranks, len(frame.holdings))
    for part in range(len(frame.holdings[0])):
        label = "heard of" if trace.program.task.op == "barrier" else f"part {part}"
        parts.append(svg.text(20, cells_top + part * _CELL_H + 13, label, "note held"))
    for sent in frame.messages:
        parts += _arrow(sent, cells_top - 16, len(frame.holdings))
    return parts


def _middle(rank: int) -> float:
    return _LEFT + rank * (_CELL_W + _GAP) + _CELL_W / 2


def _cell(rank: int, top: float, ranks: frozenset[int], num_ranks: int) -> list[str]:
    left = _middle(rank) - _CELL_W / 2
    opacity = 0.08 + 0.5 * len(ranks) / num_ranks if ranks else 0.0
    return [
        f'<rect class="cell" x="{left:.1f}" y="{top:.1f}" width="{_CELL_W:g}" height="{_CELL_H:g}" '
        f'fill-opacity="{opacity:.2f}"/>',
        svg.text(_middle(rank), top + 13, _holders(ranks), "held", "middle"),
    ]


def _arrow(sent: Sent, base: float, num_ranks: int) -> list[str]:
    """From rank to rank, above the cells; higher the further it goes."""
    kind = "" if sent.is_reduced else " copy"
    is_right = sent.target > sent.source
    start = _middle(sent.source) + (6 if is_right else -6)
    stop = _middle(sent.target) + (-6 if is_right else 6)
    height = 8 + 24 * abs(sent.target - sent.source) / max(1, num_ranks - 1)
    peak = base - height
    bend = f"{start:.1f},{peak:.1f} {stop:.1f},{peak:.1f} {stop:.1f},{base:.1f}"
    path = f"M{start:.1f},{base:.1f} C{bend}"
    tip = f"{stop - 3:.1f},{base - 5:.1f} {stop + 3:.1f},{base - 5:.1f} {stop:.1f},{base + 1:.1f}"
    return [
        f'<path class="arrow{kind}" d="{path}"/>',
        f'<polygon class="tip{kind}" points="{tip}"/>',
    ]

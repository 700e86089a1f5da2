"""Code as a person reads it: headings, colours on a terminal, and the heart of a long listing."""

import os
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

WIDTH = 100
_MOST_LINES = 56
"""Lines of one listing that are shown without --full."""
_KEPT_LINES = 34
"""Lines at the start of a long loop that are shown; from its end come half as many."""
_WORTH_SHOWING = 16
"""Lines of a loop that is no mere copying or calling."""

_LABEL = re.compile(r"^([\w.$]+):")
_JUMP = re.compile(r"label %([\w.$]+)|\s(?:j\w+|b\.\w+|b|cbn?z|tbn?z)\s.*?(\.?L\w+)")


@dataclass(frozen=True)
class Style:
    """Colours, or none of them."""

    is_coloured: bool

    @staticmethod
    def of(stream: TextIO) -> "Style":
        """Colours on a terminal, unless NO_COLOR is set (no-color.org)."""
        return Style(stream.isatty() and not os.environ.get("NO_COLOR"))

    def bold(self, text: str) -> str:
        return self._paint("1", text)

    def faint(self, text: str) -> str:
        return self._paint("2", text)

    def green(self, text: str) -> str:
        return self._paint("32", text)

    def heading(self, text: str) -> str:
        """A line that starts a part."""
        return f"{self.bold(text)}\n{self.faint('-' * len(text))}"

    def _paint(self, code: str, text: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.is_coloured else text


def indented(text: str, spaces: int = 4) -> str:
    return textwrap.indent(text, " " * spaces)


def wrapped(text: str, spaces: int) -> str:
    """Prose, in lines of WIDTH that start with so many spaces."""
    indent = " " * spaces
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=indent)


def heart_of(code: str) -> str:
    """A listing of IR or assembly; of a long one its first line, its largest loop, and its end.

    Of a long one prefetches are left out, too: they compute nothing.
    """
    if code.count("\n") < _MOST_LINES:
        return code
    lines = without_prefetches(code.splitlines())
    start, stop = largest_loop(lines)
    head = 1 if start > 0 else 0
    parts = [
        *lines[:head],
        *_gap(start - head),
        *_shortened(lines[start:stop]),
        *_gap(len(lines) - 1 - stop),
        *lines[max(stop, len(lines) - 1) :],
    ]
    return "\n".join(parts)


def without_prefetches(lines: Sequence[str]) -> list[str]:
    """Leave out prefetches, and addresses that only they used."""
    kept = [line for line in lines if not re.search(r"\bcall .*prefetch|^\s+prefetch", line)]
    uses = Counter(name for line in kept for name in re.findall(r"%[\w.]+", line))
    left = [line for line in kept if not _is_idle(line, uses)]
    return left if len(left) == len(kept) else without_prefetches(left)


def _is_idle(line: str, uses: Counter[str]) -> bool:
    address = re.match(r"\s+(%[\w.]+) = getelementptr", line)
    return address is not None and uses[address[1]] == 1


def largest_loop(lines: Sequence[str]) -> tuple[int, int]:
    """The longest basic block that jumps to itself, as a range of lines.

    Where there is none worth showing, the longest block.
    """
    starts = [0, *(i for i, line in enumerate(lines) if i and _LABEL.match(line))]
    blocks = list(zip(starts, [*starts[1:], len(lines)], strict=True))
    loops = [block for block in blocks if _is_loop(lines[slice(*block)])]
    loop = max(loops, key=_length, default=(0, 0))
    return loop if _length(loop) >= _WORTH_SHOWING else max(blocks, key=_length)


def _length(block: tuple[int, int]) -> int:
    return block[1] - block[0]


def _is_loop(block: Sequence[str]) -> bool:
    label = _LABEL.match(block[0])
    jumps = [name for line in block[-3:] for pair in _JUMP.findall(line) for name in pair]
    return label is not None and label[1] in jumps


def _shortened(block: Sequence[str]) -> list[str]:
    """The start and the end of a long block."""
    tail = _KEPT_LINES // 2
    left_out = len(block) - _KEPT_LINES - tail
    if left_out < 4:
        return list(block)
    return [*block[:_KEPT_LINES], *_gap(left_out), *block[-tail:]]


def _gap(count: int) -> list[str]:
    if count <= 0:
        return []
    return [f"        ... {count} more lines" if count > 1 else "        ... one more line"]

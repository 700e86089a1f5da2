"""Pieces of SVG pictures: text, lines, and a style that suits light and dark pages."""

from html import escape

STYLE = """
svg { background: #fff; color: #1a1a2e; font: 12px system-ui, sans-serif }
.axis { stroke: currentColor; stroke-opacity: .5 }
.grid { stroke: currentColor; stroke-opacity: .1 }
.line { fill: none; stroke: #2563eb; stroke-width: 1.6 } .second { stroke: #d97706 }
text { fill: currentColor } .title { font-weight: 600; font-size: 13px }
.mark { stroke: #dc2626; stroke-dasharray: 3 3 } .note { fill-opacity: .7 }
@media (prefers-color-scheme: dark) {
  svg { background: #16181d; color: #e6e6ea } .line { stroke: #60a5fa } .second { stroke: #fbbf24 }
}
"""


def document(width: float, height: float, title: str, body: str, *, style: str = STYLE) -> str:
    """A picture as a file; `title` is for those who cannot see it."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n{body}\n</svg>\n"
    )


def segment(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def text(x: float, y: float, words: str, style: str, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{style}" {place}>{escape(words)}</text>'

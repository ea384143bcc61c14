"""A sheet to draw on: boxes, lines and notes as SVG. Knows nothing of what is drawn."""

from __future__ import annotations

from xml.sax.saxutils import escape

WIDTH, HEIGHT = 1200, 868
NOTES = 884
"""Left edge of the notes beside the panels."""
INK, SOFT, LINE = "#1d2127", "#5d6673", "#9aa2ad"


class Sheet:
    """SVG elements in the order they are drawn. Positions are those of the top left corner."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        said: str,
        *,
        size: int = 12,
        color: str = SOFT,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        """A line of text on the base line y; *words between stars* are terms: bold and dark."""
        pieces = []
        for index, piece in enumerate(said.split("*")):
            term = f'<tspan font-weight="bold" fill="{INK}">{escape(piece)}</tspan>'
            pieces.append(term if index % 2 else escape(piece))
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" '
            f'text-anchor="{anchor}"{weight}>{"".join(pieces)}</text>'
        )

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none",
        *, dashed: bool = False, thick: float = 1,
    ) -> None:  # fmt: skip
        dash = ' stroke-dasharray="3 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="2" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="{thick:g}"{dash}/>'
        )

    def line(self, points: list[tuple[float, float]], color: str = LINE, thick: float = 1) -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{thick:g}"/>'
        )

    def bracket(self, left: float, right: float, y: float, depth: float = 5) -> None:
        """A bracket that opens downwards (upwards with a negative depth)."""
        self.line([(left, y + depth), (left, y), (right, y), (right, y + depth)])

    def notes(self, y: float, *lines: str) -> None:
        """Lines beside a panel; one that begins with a term begins a paragraph."""
        for index, said in enumerate(lines):
            y += 5 if index and said.startswith("*") else 0
            self.text(NOTES, y + 16 * index, said)

    def svg(self) -> str:
        label = "A prompt, two cliffs, three storage groups and their blocks, with the terms of the code"
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'font-family="system-ui, DejaVu Sans, sans-serif" role="img" aria-label="{label}">'
        )
        ground = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
        return "\n".join([head, ground, *self.parts, "</svg>", ""])

"""The look that all figures share, and how they are saved. (matplotlib only)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SPANS = ("system", "image", "user", "output")
"""What an answer's attention goes to, in the order of the prompt."""

# Okabe and Ito's palette, told apart under the common kinds of colour blindness; where colours carry
# meaning, markers or line styles differ too.
BLUE, AMBER, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, VERMILION, BLACK = "#56B4E9", "#D55E00", "#000000"
SPAN_COLOURS = {"system": "#999999", "image": AMBER, "user": BLUE, "output": GREEN}
SPAN_MARKERS = {"system": "s", "image": "o", "user": "^", "output": "D"}
COLOURS = (BLUE, AMBER, GREEN, PINK, SKY, VERMILION, BLACK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
QUIET = "#555555"
"""Reference lines and their labels."""
MASS_MAP = "cividis"
"""For shares: even in lightness, and made for colour-blind readers."""

RC: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "legend.frameon": False,
    "svg.hashsalt": "vllm-flow",
    "savefig.facecolor": "white",
}


@contextlib.contextmanager
def house(**changes: Any) -> Iterator[Any]:
    """matplotlib.pyplot in the house's style, without a display.

    Args:
        changes: what one figure does otherwise, as matplotlib's settings with `_` for `.`.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(RC | {name.replace("_", "."): value for name, value in changes.items()}):
        yield plt


def save(
    plt: Any, figure: Any, stem: Path, dpi: int = 160, transparent: bool = False
) -> list[Path]:
    """Write `stem`.png and `stem`.svg, the same bytes for the same figure; return their paths.

    Args:
        transparent: the SVG has no background, for pages that are light or dark.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    figure.savefig(paths[0], dpi=dpi, metadata={"Software": None})
    figure.savefig(paths[1], dpi=dpi, metadata={"Date": None}, transparent=transparent)
    plt.close(figure)
    return paths

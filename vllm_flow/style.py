"""The look that all figures share, and how they are saved. (matplotlib only)"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from vllm_flow.outputs import write_whole

SPANS = ("system", "image", "user", "output")
"""What an answer's attention goes to, in the order of the prompt."""

# Okabe and Ito's palette, told apart under the common kinds of colour blindness.
SPAN_COLOURS = {"system": "#999999", "image": "#E69F00", "user": "#0072B2", "output": "#009E73"}
SPAN_MARKERS = {"system": "s", "image": "o", "user": "^", "output": "D"}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
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
def house() -> Iterator[Any]:
    """matplotlib.pyplot in the house's style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(RC):
        yield plt


def save(plt: Any, figure: Any, stem: Path, dpi: int = 160) -> list[Path]:
    """Write `stem`.png and `stem`.svg, the same bytes for the same figure; return their paths."""
    paths = [stem.with_name(stem.name + ending) for ending in (".png", ".svg")]
    for path, metadata in zip(paths, ({"Software": None}, {"Date": None}), strict=True):
        write_whole(path, partial(figure.savefig, dpi=dpi, metadata=metadata))
    plt.close(figure)
    return paths

"""The finder's figure says what each of its lines stands for, and no text of it is cut off or lies on another."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from vllm_flow.eval.cliff import figure

LAYERS = 30


def between(value: float) -> dict[str, float]:
    return {"value": value, "low": value / 2, "high": 1.5 * value + 0.01}


def attention(cliff: int) -> dict[str, Any]:
    masses = [between(0.2 / (layer + 1)) for layer in range(LAYERS)]
    return {"flow_cliff": cliff, "share": 0.1, "items": 3, "image_mass": masses}


def labelled(found: int, loss: float, swept: float | None = None) -> dict[str, Any]:
    curve = [
        {"layer": layer, "items": items, "score": 0.9, **between(loss)}
        for layer, items in ((3, 30), (found, 120), (25, 90))
    ]
    sweep = (
        []
        if swept is None
        else [{"layer": layer, "value": swept - layer / 30} for layer in range(LAYERS)]
    )
    test = {"layer": found, "passed": found < LAYERS, "items": 90, **between(loss)}
    return {
        "flow_cliff": found,
        "evidence": {
            "method": "labelled", "metric": "f1", "items": 120, "tolerance": 0.06, "confidence": 0.95, "tests": [test],
            "curve": curve, "requests": 720, "requests_of_a_sweep": 3720, "attention": attention(22),
        } | ({"sweep": {"flow_cliff": found, "curve": sweep}} if sweep else {}),
    }  # fmt: skip


def unlabelled(found: int) -> dict[str, Any]:
    curve = [
        {"layer": layer, "kl": between(2.0**-layer), "same_answer": between(0.5)}
        for layer in range(LAYERS)
    ]
    return {
        "flow_cliff": found,
        "evidence": {
            "method": "unlabelled", "items": 10, "confidence": 0.95, "threshold": 0.003, "curve": curve,
            "attention": attention(LAYERS),
        },
    }  # fmt: skip


CASES = {
    "found": labelled(16, 0.02),
    "logarithmic": labelled(16, 0.9),
    "swept": labelled(16, 0.02, swept=0.98),
    "swept below": labelled(16, 0.02, swept=0.5),
    "nothing found": labelled(LAYERS, 0.2),
    "without labels": unlabelled(19),
    "at the first layer": unlabelled(0),
}


@pytest.fixture(params=list(CASES))
def drawn(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[dict[str, Any], Any]]:
    """An entry of a profile, and its figure as it is saved."""
    kept = []

    def keep(plt: Any, drawing: Any, stem: Path) -> list[Path]:
        drawing.canvas.draw()
        kept.append((plt, drawing))
        return []

    monkeypatch.setattr(figure, "save", keep)
    entry = CASES[request.param]
    figure.draw("pope", entry, LAYERS, Path("cliff.json"))
    ((plt, drawing),) = kept
    yield entry, drawing
    plt.close(drawing)


def test_every_line_across_a_panel_is_named(drawn: tuple[dict[str, Any], Any]) -> None:
    entry, drawing = drawn
    first, *_ = drawing.axes
    names = [text.get_text() for text in first.get_legend().get_texts()]
    assert ("found" in names) == (entry["flow_cliff"] < LAYERS)
    for axis in drawing.axes:
        across = [line for line in axis.lines if line.get_linestyle() == ":"]
        assert [note.xy[1] for note in axis.texts] == [line.get_ydata()[0] for line in across]
        assert all(note.get_text() for note in axis.texts)
        assert axis.get_ylabel() not in ("", "%")
    assert drawing.axes[-1].get_xlabel() == "layers that see the image"
    title = "16 of 30 layers see the image" if entry["flow_cliff"] == 16 else ""
    assert title in drawing.get_suptitle() and drawing.get_suptitle().startswith("POPE: ")


def test_every_point_is_in_view(drawn: tuple[dict[str, Any], Any]) -> None:
    for axis in drawn[1].axes:
        low, high = axis.get_ylim()
        for line in axis.lines:
            if len(line.get_xdata()) > 2:
                assert all(low <= value <= high for value in line.get_ydata())


def test_no_text_is_cut_off_or_covered(drawn: tuple[dict[str, Any], Any]) -> None:
    _, drawing = drawn
    page, boxes = drawing.bbox, {}
    for number, axis in enumerate(drawing.axes):
        for text in (axis.title, axis._left_title, axis.yaxis.label, axis.xaxis.label, *axis.texts):
            if text.get_text():
                boxes[number, text.get_text()] = text.get_window_extent()
    first, *_ = drawing.axes
    boxes[0, "legend"] = first.get_legend().get_window_extent()
    assert not first.get_legend().get_window_extent().overlaps(first.get_window_extent())
    for text in drawing.texts:
        boxes[-1, text.get_text()] = text.get_window_extent()
    for place, box in boxes.items():
        assert box.x0 >= page.x0 and box.x1 <= page.x1, place
        assert box.y0 >= page.y0 and box.y1 <= page.y1, place
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        assert not first.overlaps(second), (one, other)

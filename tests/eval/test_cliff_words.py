"""What is said of a found cliff: one in the singular, no minus before nothing, and whose loss it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_flow.eval.cliff import figure, table
from vllm_flow.eval.cliff.unlabelled import attention
from vllm_flow.style import house

LAYERS = 6
MEAN = {"value": 0.5, "low": 0.25, "high": 0.75}


def labelled(items: int) -> dict[str, Any]:
    test = {"layer": 2, "passed": True, "items": items, "value": -1e-9, "low": -0.01, "high": 0.03}
    return {
        "flow_cliff": 2,
        "evidence": {
            "method": "labelled", "rung": 2, "metric": "f1", "items": items, "items_left_out": 0,
            "tolerance": 0.05, "confidence": 0.95, "smallest_tolerance": 0.04, "loss": -1e-9,
            "interval": [-0.01, 0.03], "tests": [test], "curve": [], "requests": 7, "requests_of_a_sweep": 14,
        },
    }  # fmt: skip


@pytest.mark.parametrize(("items", "said"), [(1, "1 question "), (2, "2 questions ")])
def test_questions_are_counted_in_words(items: int, said: str) -> None:
    lines = table.labelled_words("pope", labelled(items), LAYERS)
    assert sum(said in f"{line} " for line in lines) == 2, lines
    unlabelled = {
        "method": "unlabelled", "rung": 2, "items": items, "requests": 7, "rule": "upper",
        "threshold": 0.003, "by_rule": {"mean": 1, "upper": 2},
    }  # fmt: skip
    lines = table.unlabelled_words("pope", {"flow_cliff": 2, "evidence": unlabelled}, LAYERS)
    assert f"On {said.strip()}, 7 requests" in lines[1]
    alone = {"flow_cliff": 1, "share": 0.1, "items": items, "remark": ""}
    assert f"({said.strip()}, first" in table.attention_words(alone, LAYERS)


def test_the_loss_in_the_sentence_is_that_of_its_test_and_nothing_has_no_sign() -> None:
    """The table's loss is on all questions of a layer, which is another number."""
    (first, *_) = table.labelled_words("pope", labelled(90), LAYERS)
    assert "flow_cliff 2 of 6. Loss of F1 in its test 0 points, at most 3 at 95%" in first


@pytest.mark.parametrize(("cliff", "said"), [(1, "1 layer)"), (2, "2 layers)"), (6, "no cliff)")])
def test_the_figure_counts_layers_in_words(cliff: int, said: str) -> None:
    found = {"flow_cliff": cliff, "share": 0.1, "items": 1, "image_mass": [MEAN] * LAYERS}
    with house() as plt:
        drawn, axis = plt.subplots()
        figure.draw_attention(axis, found, LAYERS)
        assert axis.get_title(loc="left" if axis.get_title(loc="left") else "center").endswith(said)
        plt.close(drawn)


def test_questions_without_pictures_have_no_attention_on_one() -> None:
    engine: Any = SimpleNamespace(
        work=SimpleNamespace(items=[SimpleNamespace(image=None)] * 3), record=None
    )
    assert attention(engine, None, 0.1) is None  # type: ignore[arg-type]

"""On the demo model a CAM of an object's word lies on that object, in the layers where it should."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from vllm_flow.analysis import demo, pointing, pointing_hooks, pointing_table
from vllm_flow.analysis.cam import Settings
from vllm_flow.analysis.pointing import Outcome
from vllm_flow.analysis.pointing_table import MEAN
from vllm_flow.analysis.vlm import Vlm, tokens_of
from vllm_flow.demo_model.assemble import assemble
from vllm_flow.demo_model.heldout import load_scenes
from vllm_flow.demo_model.questions import listing

LAYERS = (16, 17)


def outcome(*target: bool, other: bool = False, control: bool = False) -> Outcome:
    """Hits per layer, the mean's not counted."""
    count = len(target) + 1
    return Outcome((*target, False), (other,) * count, (control,) * count, 0.25, 0.2)


def test_the_layer_is_chosen_on_one_half_and_judged_on_the_other() -> None:
    first, second = [outcome(True, False)] * 4, [outcome(False, True)] * 4
    row = pointing.judge([*first, *second], (5, 6))
    assert row.layer == 5 and row.target.hits == 0 and row.target.total == 4


def test_rows_count_what_happened() -> None:
    played = [
        outcome(True, False),
        outcome(True, True, control=True),
        outcome(False, False, other=True),
    ]
    rows = pointing.summarise(played, (5, 6))
    assert [row.layer for row in rows] == [5, 6, MEAN]
    assert [row.target.hits for row in rows] == [2, 1, 0]
    assert {row.control.hits for row in rows} == {row.other.hits for row in rows} == {1}
    assert rows[0].target.chance == 0.25 and rows[0].other.chance == pytest.approx(0.2)
    assert rows[0].p_control == 0.5  # one round gained, none lost
    text = pointing_table.report(rows, rows[0])
    assert "66.7 [ 9.4, 99.2]" in text and "mean" in text


def test_the_mean_is_of_normalised_maps() -> None:
    strong, weak = np.zeros((2, 2)), np.zeros((2, 2))
    strong[0, 0], weak[1, 1], weak[0, 1] = 100, 1, 0.5
    *_, mean = pointing.with_mean({3: strong, 4: weak}, (3, 4))
    assert mean.tolist() == [[0.5, 0.25], [0, 0.5]]


def test_rounds_ask_about_objects_that_are_there() -> None:
    rounds = pointing.draw_rounds(None, "seen")
    assert len(rounds) == len({r.scene.image_path for r in rounds}) > 300  # one round per picture
    assert all({r.target, r.other} <= set(r.scene.boxes) and r.target != r.other for r in rounds)
    assert all(r.scene.facts.counts[r.target] == 1 for r in rounds)  # one box is the right one
    assert rounds[:5] == pointing.draw_rounds(5, "seen")


@pytest.mark.long
def test_the_heat_is_on_the_object_and_not_by_chance() -> None:
    """A dozen and a half pictures, two layers: better than chance, shuffled weights, another object."""
    vlm = Vlm.load(str(assemble()))
    rounds = pointing.draw_rounds(18, "seen")
    played = list(pointing.play(vlm, rounds, "naming", Settings(LAYERS, samples=0)))
    mean = pointing.summarise(played, LAYERS)[-1]
    assert mean.target.low > mean.target.chance, pointing_table.report([mean], mean)
    assert mean.target.hits >= 2 * max(mean.control.hits, mean.other.hits)


@pytest.mark.parametrize(("name", "longer"), [("dog", "hot dog"), ("bear", "teddy bear")])
def test_a_name_within_a_name_is_explained_where_it_stands_for_itself(
    name: str, longer: str
) -> None:
    words = listing([longer, "umbrella", name]).replace(" ", "| ").split("|")
    before, after = tokens_of(words, name), tokens_of(words, longer)
    assert "".join(words[i] for i in before).strip(" ,") == name
    assert "".join(words[i] for i in after).strip(" ,") == longer
    assert not set(before) & set(after)


class Parrot:
    """Answers with the caption of every scene, or with another one where it is told to."""

    def __init__(self, wrong: set[Path]) -> None:
        self.wrong = wrong
        self.captions = {s.image_path: s.caption for s in load_scenes("seen")}

    def encode(self, prompt: str, image: Path) -> str:
        return "Nothing." if image in self.wrong else self.captions[image]

    def generate(self, encoded: str) -> str:
        return encoded

    def words(self, answer: str) -> list[str]:
        return list(f" {answer}")


def test_shown_scenes_are_listed_exactly_and_every_word_has_its_box(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vllm_flow.pictures.read_picture", lambda path: path)
    scenes = load_scenes("seen")
    shown = list(demo.listed_exactly(Parrot(set()), scenes))  # type: ignore[arg-type]
    assert 100 < len(shown) < len(scenes)
    assert all(len(scene.objects) > 1 and set(scene.objects) == set(scene.boxes) for scene in shown)
    wrong = {scene.image_path for scene in shown[::2]}
    left = list(demo.listed_exactly(Parrot(wrong), scenes))  # type: ignore[arg-type]
    assert left == shown[1::2]


@pytest.mark.parametrize("task", pointing.TASKS)
def test_what_is_asked_names_the_object(task: str) -> None:
    round_ = pointing.draw_rounds(1, "seen")[0]
    prompt, answer, word = pointing.asked(round_, task)
    assert word.lower() in answer.lower()
    assert round_.target in (prompt if task == "presence" else answer)


def test_the_table_has_a_row_for_every_hook_point_layer_and_number_of_copies() -> None:
    played = [
        {"mlp": outcome(True, False), "attention": outcome(False, False, other=True)},
        {"mlp": outcome(True, True), "attention": outcome(False, True, control=True)},
    ]
    rows = pointing_hooks.rows_of(played, (0, 6))
    table = {(0, hook): found for hook, found in rows.items()}
    table |= {(8, hook): found for hook, found in rows.items()}
    text = pointing_hooks.markdown(table)
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [(cells[0], cells[1], cells[2]) for cells in lines] == [
        (f"| `{hook}`", str(layer), str(copies))
        for copies in (0, 8)
        for hook in ("mlp", "attention")
        for layer in (0, 6)
    ]
    assert [cells[3].split()[0] for cells in lines[:4]] == ["100.0", "50.0", "0.0", "50.0"]
    assert "2 scenes; by chance 25.0 %" in text and "p below 0.0063" in text


def test_the_cam_of_a_word_of_a_shown_scene() -> None:
    """As `make analysis-demo` draws it, by the command's own options."""
    vlm = Vlm.load(assemble(), "float32", "cpu")
    scene = next(s for s in load_scenes("seen") if 2 <= len(s.objects) == len(s.boxes))
    record = demo.cam_of(vlm, scene, scene.objects[0], 0)
    assert record.answer == scene.caption and record.word == scene.objects[0]
    assert record.layers == tuple(range(30)) and record.heat.shape == (30, 12, 12)
    assert record.coverage is not None and record.samples == 0
    assert demo.only(record, (4, 28)).heat.shape == (2, 12, 12)


def test_the_demo_says_how_far_it_is_where_somebody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for looking in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda looking=looking: looking)
        assert list(demo.followed(iter("abc"), "captions", 3)) == ["a", "b", "c"]
        assert ("captions" in capsys.readouterr().out) is looking

"""MMBench, AI2D and MME: which option or which of yes and no, rotations, pairs, and files."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from tests.eval import files
from vllm_flow.eval.sweep.work import sample
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.ai2d import parse_letter
from vllm_flow.eval.tasks.base import Item, sum_counts
from vllm_flow.eval.tasks.cells import tsv_rows
from vllm_flow.eval.tasks.choices import infer
from vllm_flow.eval.tasks.mme import COGNITION, PERCEPTION, SUBTASKS, parse_yes_no
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError

LETTER = "\nAnswer with the option's letter from the given choices directly."

# vlmeval/utils/matching_util.py of VLMEvalKit e8e78f05, with the options below.
OPTIONS = {"A": "cat", "B": "a dog", "C": "Bird"}
INFERRED = [
    ("A", "A"), ("A.", "A"), ("(B)", "B"), ("[C]", "C"), ("*B*", "B"), ("B: a dog", "B"), ("b", None), ("D", None),
    ("The answer is B", "B"), ("answer is **C**", "C"), ("The answer is b.", "B"), ("answer is D", None),
    ("A or B", None), ("A or B, the answer is B", "B"), ("It is A cat", "A"), ("A cat, sitting on a mat", "A"),
    ("A cat that sits there on the old mat", None), ("A x x x", "A"), ("A x x x x", None), ("x x x x A", "A"),
    ("cat", "A"), ("CAT", "A"), ("concatenate", "A"), ("a dog", "B"), ("dog", None), ("bird", "C"),
    ("cat and a dog", None), ("cat" + "x" * 24, None), ("cat" + "x" * 21, "A"), ("", None), ("Z", "Z"), ("Z.", "Z"),
    ("A Z", "A"), ("Cannot determine the answer", "Z"), ("I can't process this file. A", "Z"),
    ("Failed to obtain answer via API", None), ("Failed to obtain answer via API B", None),
    ("A/B", None), ("A-B", None), ("A!", "A"), ("'A'", None), ("A\nB", None),
    ("\tB\n", "B"), ("Answer: B", "B"), ("A; A; A", "A"), ("Option B.", "B"), ("A or B, not Z", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), INFERRED)
def test_inferred(text: str, expected: str | None) -> None:
    assert infer(text, OPTIONS) == expected


def test_only_options_that_there_are() -> None:
    assert infer("C", {"A": "x", "B": "y"}) is None
    assert infer("The answer is C, x", {"A": "x", "B": "y"}) is None, "twice as long as the options"
    assert infer("C B", {"A": "x", "B": "y"}) == "B"


def row(index: int, answer: str, **more: object) -> dict:
    """One row of MMBench: the rotation `index // 1000000` of question `index % 1000000`."""
    options = ["red", "green", "blue"]
    turn = index // 1_000_000
    turned = options[turn:] + options[:turn]
    return {
        "index": index, "question": "Which colour?", "hint": None, "A": turned[0], "B": turned[1], "C": turned[2],
        "D": None, "answer": answer, "category": "x", "l2-category": "logic_reasoning", **more,
    }  # fmt: skip


ROWS = [
    row(7, "B"),
    row(1_000_007, "A"),
    row(2_000_007, "C"),
    row(8, "A", hint='a "hint",\ttwo\nlines'),
]


def tsv(path: Path, rows: list[dict]) -> Path:
    """As pandas writes a table: quoted where a field needs it; pictures in base64, or the row that has them."""
    import csv

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "image"], delimiter="\t")
        writer.writeheader()
        for number, one in enumerate(rows):
            first = one["index"] < 1_000_000
            picture = base64.b64encode(files.png((number, 1, 2))).decode()
            writer.writerow({**one, "image": picture if first else one["index"] % 1_000_000})
    return path


def test_mmbench_official(tmp_path: Path) -> None:
    task = get_task("mmbench")
    path = tsv(tmp_path / "mmbench_dev_20230712.tsv", ROWS)
    items = task.read(tmp_path)
    assert [i.id for i in items] == ["7", "1000007", "2000007", "8"]
    assert items[1].text == "Which colour?\nA. green\nB. blue\nC. red" + LETTER
    assert items[3].text.startswith('a "hint",\ttwo\nlines\nWhich colour?\nA. red\n')
    assert [load_image(i.image).getpixel((0, 0)) for i in items] == [
        (0, 1, 2), (0, 1, 2), (0, 1, 2), (3, 1, 2),
    ]  # fmt: skip
    assert items[0].picture_of == items[2].picture_of != items[3].picture_of
    qwen = task.asked_as("qwen2-vl").read(tmp_path)[0].text
    assert qwen == (
        "Question: Which colour?\nOptions:\nA. red\nB. green\nC. blue\n"
        "Please select the correct answer from the options above."
    )
    first = [task.asked_as("qwen-vl").read(tmp_path)[index].text for index in (0, 3)]
    assert first[0] == (
        "Context: N/A\nQuestion: Which colour?\nOptions: A. red\nB. green\nC. blue\nAnswer:"
    )
    assert first[1].startswith(
        'Context: a "hint",\ttwo\nlines\nQuestion: Which colour?\nOptions: A.'
    )
    assert [task.bundle(i) for i in items] == [("7", 3)] * 3 + [("8", 1)]
    path.write_bytes(path.read_bytes()[:-40] + b'"\n')
    with pytest.raises(DataError, match="a quotation does not end"):
        task.read(tmp_path)
    tsv(tmp_path / "other_MMBench.tsv", ROWS)
    with pytest.raises(DataError, match="keep the one to be asked"):
        task.read(tmp_path)


def test_a_table_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.tsv"
    path.write_text("a\timage\n1\t2\n1\n")
    with pytest.raises(DataError, match="byte 12: 1 field, the header has 2"):
        list(tsv_rows(path, "image"))
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="no column 'image'"):
        list(tsv_rows(path, "image"))


@pytest.mark.parametrize(
    ("said", "circular", "passes"),
    [
        (["B", "A", "C", "A"], 1.0, 1.0),
        (["B", "A", "B", "A"], 0.5, 0.75),  # one rotation wrong: the question is wrong
        (["B", "A", "no idea", "A"], 0.5, 0.75),  # what a judge model would be asked is wrong
        (["green", "Green.", "the green", "red"], 1.0, 1.0),
        (["B", "A", None, "A"], 1.0, 1.0),  # not whole: left out
        (["A", "A", "A", None], 0.0, 1 / 3),
    ],
)
def test_mmbench_rotations(
    tmp_path: Path, said: list[str | None], circular: float, passes: float
) -> None:
    """eval_circular_group: a question counts when every rotation is right."""
    task = get_task("mmbench")
    tsv(tmp_path / "mmbench.tsv", ROWS)
    items = task.read(tmp_path)
    scored = [task.score(i, text) for i, text in zip(items, said, strict=True) if text is not None]
    found = task.metrics(sum_counts(task.together(scored)))
    assert (found["accuracy"], found["accuracy_passes"]) == (circular, pytest.approx(passes))
    assert found["accuracy_logic_reasoning"] == circular


def test_mmbench_hub(tmp_path: Path) -> None:
    table = [
        {**{k: v for k, v in one.items() if k != "l2-category"}, "L2-category": "coarse_perception",
         "D": "nan", "image": files.hub_image((5, 5, 5))} for one in ROWS
    ]  # fmt: skip
    path = files.parquet(tmp_path / "en/dev-0.parquet", table)
    items = get_task("mmbench").read(tmp_path)
    assert [i.id for i in items] == ["7", "1000007", "2000007", "8"]
    assert items[0].group == "coarse_perception" and "D." not in items[0].text
    files.parquet(path, [table[0] | {"A": "red", "B": None, "answer": "A"}])
    (gap,) = get_task("mmbench").read(tmp_path)
    assert gap.truth["options"] == {"A": "red"}  # the official script ends at the first gap
    files.parquet(path, [table[0] | {"answer": "D"}])
    with pytest.raises(DataError, match="row 0: the answer 'D' is not one of the 3 options"):
        get_task("mmbench").read(tmp_path)


# AI2D: the filter and exact_match of lmms-eval 0.7.3, tasks/ai2d.
@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "b"), ("b", "b"), ("B.", "b"), (" B. x", "b"), ("B. a cat", "b"), ("(B)", "b"), ("B)", "b"),
        ("b. cat", "b cat"), ("B cat", "b cat"), (" B", " b"), ("", ""), ("B: x", "b x"), ("\n\tB.", "b"),
        ("**B**", "b"), ("AB.", "ab"), ("The answer is B", "the answer is b"),
    ],
)  # fmt: skip
def test_ai2d_rule(text: str, letter: str) -> None:
    assert parse_letter(text) == letter
    assert get_task("ai2d").score(Item("1", "", None, {"answer": "B"}), text).score == (
        letter == "b"
    )


def test_ai2d_layouts(tmp_path: Path) -> None:
    def question(number: int, letters: bool) -> dict:
        return {
            "questionId": f"0.png-{number}", "answerTexts": ["x", "y", "z", "w"], "correctAnswer": number,
            "abcLabel": letters,
        }  # fmt: skip

    content = {
        "imageName": "0.png",
        "questions": {"P?": question(0, False), "Q?": question(1, True)},
    }
    files.json_file(tmp_path / "a/ai2d/questions/0.png.json", content)
    files.json_file(tmp_path / "a/ai2d/questions/1.png.json", content | {"imageName": "1.png"})
    (tmp_path / "a/ai2d_test_ids.csv").write_text("0\n")
    items = get_task("ai2d").read(tmp_path / "a")
    assert [(i.id, i.truth["answer"]) for i in items] == [("0.png-0", "A"), ("0.png-1", "B")]
    assert items[0].text == "P?\nA. x\nB. y\nC. z\nD. w" + LETTER
    assert items[0].image == str(tmp_path / "a/ai2d/images/0.png")
    assert items[1].image == str(tmp_path / "a/ai2d/abc_images/0.png")
    rows = [
        {
            "question": "P?",
            "options": ["x", "y"],
            "answer": str(n),
            "image": files.hub_image((1, 1, 1)),
        }
        for n in (0, 1, 2)
    ]
    path = files.parquet(tmp_path / "b/test-0.parquet", rows[:2])
    hub = get_task("ai2d").read(tmp_path / "b")
    assert [i.truth["answer"] for i in hub] == ["A", "B"] and hub[0].picture_of == hub[1].picture_of
    files.parquet(path, rows)
    with pytest.raises(DataError, match="row 2: answer 2 of 2 options"):
        get_task("ai2d").read(tmp_path / "b")


# MME: parse_pred_ans and process_result of eval_tool/calculation.py.
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"), ("yes.", "yes"), ("YES", "yes"), ("No", "no"), ("no, it", "no"), (" Yes", "yes"),
        ("  no", "no"),
        ("   no", "other"), ("Know", "no"), ("Eyes", "yes"), ("None", "no"), ("not", "no"), ("y", "other"),
        ("n", "other"), ("", "other"), ("It is yes", "other"), ("\nno", "no"), ("\nyes", "yes"),
        ("\n yes", "other"), ("1no", "no"),
    ],
)  # fmt: skip
def test_mme_rule(text: str, said: str) -> None:
    assert parse_yes_no(text) == said


def mme_folders(folder: Path) -> Path:
    """Two pictures of a subtask beside their texts, two of another one in folders of their own."""
    for name, text, image in (("count", "", ""), ("posters", "questions_answers_YN", "images")):
        for number in (1, 2):
            path = folder / name / text / f"{number}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                f"Is it {name}? Please answer yes or no.\tYes\nIs it not? Please answer yes or no.\tNo\n"
            )
            files.image_file(folder / name / image / f"{number}.{'png' if number == 1 else 'jpg'}")
    return folder


def test_mme_layouts_and_points(tmp_path: Path) -> None:
    task = get_task("mme")
    mme_folders(tmp_path / "a/MME_Benchmark_release_version/MME_Benchmark")
    items = task.read(tmp_path / "a")
    assert [i.id for i in items[:3]] == ["count/1.png#1", "count/1.png#2", "count/2.jpg#1"]
    assert items[0].text == "Is it count?\nAnswer the question using a single word or phrase."
    assert task.asked_as("qwen2-vl").read(tmp_path / "a")[0].text == (
        "Is it count? Please answer yes or no."
    )
    assert load_image(items[0].image).size == (3, 2)
    said = ["Yes", "No", "Yes", "Yes", "yes", "maybe", "No", "No"]
    scored = [task.score(i, text) for i, text in zip(items, said, strict=True)]
    found = task.metrics(sum_counts(task.together(scored)))
    # calculation.py: 100 x 3/4 + 100 x 1/2 of 200; 100 x 2/4 + 0 of 200.
    assert (found["count"], found["posters"]) == (125 / 200, 50 / 200)
    assert found["perception"] == pytest.approx((125 + 50) / 400), "of the subtasks that are there"
    assert found["cognition"] == 0.0
    assert task.full_marks["perception"] == 200 * len(PERCEPTION) == 2000
    assert task.full_marks["cognition"] == 200 * len(COGNITION) == 800
    assert scored[5].unclear and not scored[4].unclear
    alone = task.metrics(sum_counts(task.together(scored[:1])))
    assert alone["count"] == 0.5, "a picture with one answer is in no pair"


def test_mme_hub(tmp_path: Path) -> None:
    task = get_task("mme")
    items = task.read(mme_folders(tmp_path / "a"))
    table = [
        {"question_id": i.truth["question_id"], "question": i.truth["question"], "category": i.group,
         "answer": i.truth["label"].title(), "image": files.hub_image((1, 1, 1))} for i in items
    ]  # fmt: skip
    path = files.parquet(tmp_path / "b/test-0.parquet", table)
    hub = task.read(tmp_path / "b")
    assert [(i.id, i.text, i.truth, i.picture_of) for i in hub] == [
        (i.id, i.text, i.truth, i.picture_of) for i in items
    ]
    files.parquet(path, table[:3])
    with pytest.raises(DataError, match="count/2.jpg has not two questions"):
        task.read(tmp_path / "b")
    files.parquet(path, [table[0] | {"category": "x"}])
    with pytest.raises(DataError, match="unknown subtask 'x'"):
        task.read(tmp_path / "b")


def test_a_sample_keeps_what_is_scored_together(tmp_path: Path) -> None:
    task = get_task("mme")
    items = task.read(mme_folders(tmp_path))
    for limit in (2, 3, 5, 8):
        drawn = sample(items, limit, 3, task)
        assert len(drawn) == limit - limit % 2
        assert [i.id for i in drawn] == [i.id for i in items if i in drawn], "order is kept"
        assert len({task.bundle(i) for i in drawn}) == len(drawn) // 2
    assert len(SUBTASKS) == 14

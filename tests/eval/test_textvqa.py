"""TextVQA: the normalisation case by case, the soft accuracy, prompts to the letter, both layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError
from vllm_flow.eval.tasks.textvqa import (
    ARTICLES,
    CONTRACTIONS,
    MARKS,
    NUMBERS,
    OCR,
    normalise,
    question_text,
    soft_accuracy,
)

TASK, BARE = get_task("textvqa"), get_task("textvqa-no-ocr")

NORMALISED = [
    # Case, ends, white space.
    ("", ""), (" ", ""), ("\n", ""), ("Nokia", "nokia"), ("NOKIA", "nokia"), ("  Nokia  ", "nokia"),
    ("a\nb", "b"), ("x\ny", "x y"), ("x\ty", "x y"), ("x  y", "x y"), ("\tx\n", "x"), ("x\r\ny", "x y"),
    ("x\u00a0y", "x y"), ("ÉCOLE", "école"), ("STRASSE", "strasse"),
    # Commas and question marks go, wherever they are.
    ("1,000", "1000"), ("x, y", "x y"), ("x,y", "xy"), (",", ""), ("?", ""), ("what?", "what"), ("x?y", "xy"),
    ("? x", "x"), (", x", "x"), (",,x", "x"),
    # 's stands apart.
    ("joe's", "joe 's"), ("joe's bar", "joe 's bar"), ("'s", "'s"), ("it's", "it 's"), ("JOE'S", "joe 's"),
    ("joes'", "joes'"), ("let's", "let 's"), ("she's", "she 's"), ("that's", "that 's"), ("x's's", "x 's 's"),
    ("what's", "what 's"), ("o'clock", "o'clock"), ("joe’s", "joe’s"), ("x'sy", "x 'sy"),
    # A mark next to a space is deleted everywhere, else it becomes a space.
    ("x-y", "x y"), ("x - y", "x y"), ("x -y", "x y"), ("x- y", "x y"), ("a-b c -d", "ab c d"),
    ("x-y z", "x y z"), ("-x", "x"), ("x-", "x"), ("--", ""), ("x--y", "x y"), ("x-y -z", "xy z"),
    ("x/y", "x y"), ("x / y", "x y"), ("x/y /z", "xy z"), ("(x)", "x"), ("(x) y", "x y"), ("f(x)", "f x"),
    ("f(x) y", "f x y"), ("f (x)y", "f x y"), ("[x]y", "x y"), ("{x}y", "x y"), ('"x"', "x"), ('x "y"', "x y"),
    ('x"y"z', "x y z"), ("x;y", "x y"), ("x; y", "x y"), ("x=y", "x y"), ("x+y", "x y"), ("x + y", "x y"),
    ("x\\y", "x y"), ("x_y", "x y"), ("x>y<z", "x y z"), ("x@y", "x y"), ("x@y.com", "x ycom"),
    ("x @y", "x y"), ("x`y", "x y"), ("x!y", "x y"), ("x! y", "x y"), ("wow!", "wow"), ("x!\ty", "x y"),
    ("x!\ny!z", "x yz"), ("x-\u00a0y-z", "x y z"), ("x-y/ z-w", "x y z w"), ("x:y", "x:y"), ("x-/y-z", "x y z"),
    ("x/-y-z", "x y z"), ("x/ -y/z-w", "x yzw"), ("x&y", "x&y"),
    ("x*y", "x*y"), ("#1", "#1"), ("$5", "$5"), ("50%", "50%"), ("x|y", "x|y"), ("x~y", "x~y"), ("x^y", "x^y"),
    ("x: y", "x: y"), ("“x”", "“x”"), ("x–y", "x–y"), ("it's-x", "it 's x"), ("x-'s", "x 's"),
    # Full stops go unless a digit follows.
    ("5.5", "5.5"), (".5", ".5"), ("5.", "5"), ("x.y", "xy"), ("x. y", "x y"), ("...", ""), ("u.s.a.", "usa"),
    ("x.5", "x.5"), ("5.x", "5x"), ("1.2.3", "1.2.3"), ("no. 5", "no 5"), ("no.5", "no.5"), ("1..2", "1.2"),
    ("x.-5", "x 5"), ("x. 5", "x 5"), ("5.٥", "5.٥"), ("." * 32 + "x", "x"), ("." * 33 + "x", ".x"),
    ("." * 40 + "x", "." * 8 + "x"), ("x" + ".y" * 34, "x" + "y" * 32 + ".y" * 2), (".5" * 40, ".5" * 40),
    ("." * 31 + ".5.", ".5"), ("." * 32 + ".5.", ".5."),
    # Numbers, articles, contractions.
    ("none", "0"), ("None", "0"), ("zero", "0"), ("one", "1"), ("TEN", "10"), ("eleven", "eleven"),
    ("two three", "2 3"), ("twenty-one", "twenty 1"), ("one's", "1 's"), ("someone", "someone"), ("1", "1"),
    ("seven up", "7 up"), ("the", ""), ("a", ""), ("an", ""), ("The Beatles", "beatles"), ("an a the", ""),
    ("theater", "theater"), ("a.", ""), ("a-b", "b"), ("plan a", "plan"), ("the-the", ""), ("a's", "'s"),
    ("dont", "don't"), ("don't", "don't"), ("DONT", "don't"), ("cant", "can't"), ("im", "im"), ("ive", "ive"),
    ("hes", "he's"), ("id've", "id've"), ("oclock", "o'clock"), ("somebody'd", "somebodyd"),
    ("somebodyd", "somebodyd"), ("couldn'tve", "couldn't've"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("ow's'at", "ow 's'at"), ("ow'sat", "ow 'sat"), ("twas", "'twas"), ("yall", "y'all"),
    ("y'allll", "y'all'll"), ("thats", "that's"), ("whos who", "who's who"), ("its", "its"),
    ("shell", "shell"), ("well", "well"), ("were", "were"), ("maam", "ma'am"), ("aint.", "ain't"),
    ("wont one", "won't 1"), ("a dont", "don't"), ("youve", "you've"), ("shouldve", "should've"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), NORMALISED)
def test_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected


def by_hand(text: str) -> str:
    """The rule again, slower: characters and lists in place of replacements."""
    text = "".join(c for c in text.lower() if c not in ",?")
    text = re.sub("'s", " 's", text).strip()
    text = "".join(" " if c in "\n\t" else c for c in text).strip()
    beside = {c for c, d in zip(text, text[1:], strict=False) if d == " "}
    beside |= {d for c, d in zip(text, text[1:], strict=False) if c == " "}
    spaced = [("" if c in beside else " ") if c in ';/[]"{}()=+\\_-><@`,?!' else c for c in text]
    spaced = list("".join(spaced))
    kept, removed = [], 0
    for c, following in zip(spaced, [*spaced, ""][1:], strict=True):
        if c == "." and not following.isdecimal() and removed < 32:
            removed += 1
        else:
            kept.append(c)
    words = []
    for word in "".join(kept).split():
        word = NUMBERS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(CONTRACTIONS.get(word, word))
    return " ".join(words)


@given(
    st.text(alphabet="ab1.,-/ \t\n?!'s(", max_size=25)
    | st.lists(st.sampled_from(["one", "the", "dont", "'s", " ", "-", ".", "5", "\n"])).map("".join)
    | st.text(max_size=20)
)
def test_the_rule_by_characters(text: str) -> None:
    assert normalise(text) == by_hand(text)


def test_tables() -> None:
    assert len(MARKS) == len(set(MARKS)) == 21
    assert sorted(ARTICLES) == ["a", "an", "the"]
    assert [NUMBERS[word] for word in ("none", "zero", "one", "nine", "ten")] == [
        "0",
        "0",
        "1",
        "9",
        "10",
    ]
    assert len(NUMBERS) == 12
    assert all(key.replace("'", "") == word.replace("'", "") for key, word in CONTRACTIONS.items())


SCORES = [
    (["nokia"] * 10, "Nokia", 1.0),
    (["nokia"] * 4 + ["x"] * 6, "nokia", 1.0),
    (["nokia"] * 3 + ["x"] * 7, "nokia", 0.9),
    (["nokia"] * 2 + ["x"] * 8, "nokia", 0.6),
    (["nokia"] + ["x"] * 9, "nokia", 0.3),
    (["x"] * 10, "nokia", 0.0),
    (["Nokia.", "NOKIA", "the nokia", "nokia"] + ["x"] * 6, "a nokia!", 1.0),
    (["five"] * 2 + ["5"] * 2 + ["x"] * 6, "5", 1.0),
    (["the"] * 3 + ["x"] * 7, "", 0.9),
    (["unanswerable"] * 5 + ["x"] * 5, "unanswerable x", 0.0),
]


@pytest.mark.parametrize(("answers", "text", "expected"), SCORES)
def test_soft_accuracy(answers: list[str], text: str, expected: float) -> None:
    assert soft_accuracy(text, answers) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.sampled_from("xyz"), min_size=10, max_size=10))
def test_soft_accuracy_leaves_one_out(answers: list[str]) -> None:
    others = [[a for j, a in enumerate(answers) if j != i] for i in range(10)]
    expected = sum(min(1, rest.count("x") / 3) for rest in others) / 10
    assert soft_accuracy("x", answers) == pytest.approx(expected, abs=1e-15)
    table = {0: 0.0, 1: 0.3, 2: 0.6, 3: 0.9}
    assert soft_accuracy("x", answers) == pytest.approx(table.get(answers.count("x"), 1.0))


def test_prompt() -> None:
    end = "\nAnswer the question using a single word or phrase."
    assert question_text("what is the Brand?", ["NOKIA", "12:00"]) == (
        "What is the brand?\nReference OCR token: NOKIA, 12:00" + end
    )
    assert question_text("what?", []) == "What?\nReference OCR token: " + end
    assert question_text("what?", None) == "What?" + end


def annotation(number: int, image: str, question: str, answers: list[str] | None = None) -> dict:
    return {
        "question": question,
        "image_id": image,
        "question_id": number,
        "answers": answers or ["nokia"] * 10,
        "set_name": "val",
    }


def official(folder: Path) -> Path:
    data = [
        annotation(34602, "003a8ae2ef43b901", "what is the brand?"),
        annotation(34603, "003a8ae2ef43b901", "What time?", ["ten"] * 3 + ["10"] * 7),
        annotation(34604, "ff", "what is it?"),
    ]
    files.json_file(folder / "TextVQA_0.5.1_val.json", {"data": data})
    return folder


def test_official_layout(tmp_path: Path) -> None:
    official(tmp_path)
    files.json_file(
        tmp_path / OCR, {"data": [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["NOKIA", "x"]}]}
    )
    files.image_file(tmp_path / "train_images/ff.jpg", (5, 6, 7))
    items = TASK.read(tmp_path)
    assert [item.id for item in items] == ["34602", "34603", "34604"]
    assert items[1].text.startswith("What time?\nReference OCR token: NOKIA, x\nAnswer")
    assert items[2].text.startswith("What is it?\nReference OCR token: \nAnswer")
    assert load_image(items[2].image).getpixel((0, 0)) == (5, 6, 7)
    assert items[0].image.endswith("train_images/003a8ae2ef43b901.jpg")
    assert "OCR" not in BARE.read(tmp_path)[0].text
    assert TASK.score(items[1], "Ten.").score == 1.0


def test_hub_layout(tmp_path: Path) -> None:
    rows = [
        annotation(n, f"i{n}", "what?")
        | {"ocr_tokens": tokens, "image": files.hub_image((n, 0, 0))}
        for n, tokens in enumerate((["X"], [], ["Y", "Z"]))
    ]
    files.parquet(tmp_path / "data/validation-00000-of-00002.parquet", rows[:2])
    files.parquet(tmp_path / "data/validation-00001-of-00002.parquet", rows[2:])
    items = TASK.read(tmp_path)
    lines = [item.text.split("\n")[1] for item in items]
    assert lines == [f"Reference OCR token: {t}" for t in ("X", "", "Y, Z")]
    assert [load_image(item.image).getpixel((0, 0))[0] for item in items] == [0, 1, 2]
    assert BARE.read(tmp_path)[0].text.count("\n") == 1


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither TextVQA_0.5.1_val.json"):
        TASK.read(tmp_path)
    official(tmp_path)
    with pytest.raises(DataError, match="or use textvqa-no-ocr"):
        TASK.read(tmp_path)
    assert len(BARE.read(tmp_path)) == 3
    files.json_file(tmp_path / OCR, {"data": [{"image_id": "other", "ocr_tokens": []}]})
    with pytest.raises(DataError, match="another split"):
        TASK.read(tmp_path)
    path = tmp_path / "TextVQA_0.5.1_val.json"
    files.json_file(path, {"data": [annotation(1, "i", "q?", ["x"] * 9)]})
    with pytest.raises(DataError, match="record 0: 9 answers; the rule needs 10"):
        BARE.read(tmp_path)
    files.json_file(path, {"data": [annotation(1, "i", "q?"), annotation(1, "i", "p?")]})
    with pytest.raises(DataError, match="question id 1 comes twice"):
        BARE.read(tmp_path)
    files.json_file(path, {"dat": []})
    with pytest.raises(DataError, match="no 'data'"):
        BARE.read(tmp_path)
    files.json_file(path, {"data": []})
    with pytest.raises(DataError, match="TextVQA_0.5.1_val.json: no questions in it"):
        BARE.read(tmp_path)


def test_without_ocr_tokens_the_hubs_column_is_not_needed(tmp_path: Path) -> None:
    row = annotation(1, "i", "what?") | {"image": files.hub_image((1, 0, 0))}
    files.parquet(tmp_path / "validation-00000-of-00001.parquet", [row])
    (item,) = BARE.read(tmp_path)
    assert item.text == "What?\nAnswer the question using a single word or phrase."
    with pytest.raises(DataError, match="no column ocr_tokens"):
        TASK.read(tmp_path)


def test_accuracy_is_the_mean_score(tmp_path: Path) -> None:
    items = BARE.read(official(tmp_path))
    scored = [BARE.score(item, "nokia") for item in items]
    assert [one.score for one in scored] == [1.0, 0.0, 1.0]
    assert BARE.metrics(sum_counts(scored))["accuracy"] == pytest.approx(2 / 3)
    assert BARE.metrics({})["accuracy"] == 0.0

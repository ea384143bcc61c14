"""docs/reproduce.md: its commands can be typed, its layout is read, its computed figures are what is computed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections import Counter
from pathlib import Path, PurePath

import pytest

from tests.eval import files
from tests.eval.test_scienceqa import official as scienceqa_files
from tests.eval.test_textvqa import annotation
from tests.eval.test_textvqa import official as textvqa_files
from tests.unit.test_docs_facts import FENCE, commands, read
from vllm_flow.eval.statistics.power import forecast
from vllm_flow.eval.sweep.policies import parse_policies
from vllm_flow.eval.tasks import get_task
from vllm_flow.eval.tasks.base import Item
from vllm_flow.profile import scale

PAGE = read("docs/reproduce.md")
LAYERS = 32
EVALS = [words for words in commands(PAGE) if words[0] == "eval"]
NAMED = (12, 18, 22, 24, 30)
"""Cliffs that the page's first table names."""
TASKS = ("pope", "scienceqa", "textvqa", "chair-opera")


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_every_block_is_shell() -> None:
    """As far as a shell sees without running it; `tests/unit/test_docs_facts.py` has our parser read our commands."""
    blocks = [block for _, block in FENCE.findall(PAGE)]
    assert len(blocks) == 4
    for block in blocks:
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0 and not done.stderr, done.stderr


def test_the_runs_ask_what_the_table_has() -> None:
    assert len(EVALS) == 3
    for words in EVALS:
        assert tuple(option(words, "--tasks").split(",")) == TASKS
        names = {p.name for p in parse_policies(option(words, "--policies"), LAYERS)}
        assert {"baseline", "text-only", *(f"cliff={cliff}" for cliff in NAMED)} <= names
        assert len(names) == 12, "as the estimate of time says"
    # Without --limit the same command goes on with the run that had one.
    first, second = (list(words) for words in EVALS[:2])
    at = first.index("--limit")
    assert first[:at] + first[at + 2 :] == second
    (paper,) = parse_policies("paper", LAYERS)
    assert paper.name == "cliff=22" and "`paper` is a name for `cliff=22`" in PAGE


def patterns() -> list[str]:
    """The paths of the page's tree, one by one, with `*` for names."""
    (tree,) = re.findall(r"^```\n(DATA/.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    found = tree.split()
    while any("{" in path for path in found):
        found = [
            path.replace(match[0], name, 1) if match else path
            for path in found
            for match in [re.search(r"\{([\w,]+)\}", path)]
            for name in (match[1].split(",") if match else [""])
        ]
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Made-up files of the benchmarks, where the page puts them."""
    folder = tmp_path / "DATA"
    files.pope_labels(folder / "pope/coco")
    scienceqa_files(folder / "scienceqa")
    textvqa_files(folder / "textvqa")
    tokens = {"data": [{"image_id": "ff", "ocr_tokens": ["NOKIA"]}]}
    files.json_file(folder / "textvqa/TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    splits = {name: {0: (["dog"], ["A dog."])} for name in ("val", "train")}
    files.coco(folder / "chair/annotations", splits)
    files.image_file(folder / "val2014/COCO_val2014_000000000000.jpg")
    for number in ("4", "5"):
        files.image_file(folder / f"scienceqa/images/test/{number}/image.png")
    for name in ("ff", annotation(1, "003a8ae2ef43b901", "?")["image_id"]):
        files.image_file(folder / f"textvqa/train_images/{name}.jpg")
    return folder


def asked(data: Path) -> list[tuple[str, list[Item]]]:
    """The questions of every task; CHAIR's are the same by either rule, and one needs no language data."""
    names = [name.partition("-")[0] for name in TASKS]
    return [(name, get_task(name).read(data / name)) for name in names]


def test_files_laid_out_as_the_page_says_are_found(data: Path) -> None:
    made = [path.relative_to(data.parent) for path in data.rglob("*") if path.is_file()]
    for pattern in patterns():
        assert any(path.match(pattern) for path in made), pattern
    for path in made:
        assert any(path.match(pattern) for pattern in patterns()), f"{path} is on no line"
    for name, items in asked(data):
        assert items
        for item in items:
            assert item.image is not None and Path(item.image).exists(), (name, item)
    assert "NOKIA" in get_task("textvqa").read(data / "textvqa")[2].text


@pytest.mark.parametrize("lost", ["val2014", "textvqa/train_images", "scienceqa/images"])
def test_pictures_elsewhere_are_not_found(data: Path, lost: str) -> None:
    """Else the test above finds them wherever they are."""
    shutil.move(data / lost, data.parent / "elsewhere")
    there = [Path(str(item.image)).exists() for _, items in asked(data) for item in items]
    assert not all(there)


def test_what_is_downloaded_goes_where_the_tree_has_it() -> None:
    downloads = [block for _, block in FENCE.findall(PAGE)][0]
    folders = set(re.findall(r"(?:wget -P|-d) (\S+)", downloads))
    made = set(shlex.split(re.findall(r"^mkdir -p (.*)$", downloads, re.MULTILINE)[0]))
    assert folders <= made | {str(parent) for path in made for parent in PurePath(path).parents}
    for archive in re.findall(r"unzip -q (DATA/\S+)", downloads):
        assert archive.removeprefix("DATA/") in downloads.replace(archive, "", 1), archive


def test_the_questions_power_is_what_is_computed() -> None:
    rows = re.findall(
        r"^ +\| (\w+) \| (\d+), (\d+) \| ([\d.]+) to ([\d.]+) \|$", PAGE, re.MULTILINE
    )
    assert [row[0] for row in rows] == ["POPE", "ScienceQA", "TextVQA", "captions"]
    for _, questions, pictures, low, high in rows:
        asked = [str(n % int(pictures)) for n in range(int(questions))]
        assert len(Counter(asked)) == int(pictures)
        assert f"more than {low} to {high} points" in forecast(asked, 0.01)


@pytest.mark.parametrize(
    ("text", "out", "rates"), [(64, 4, ("55.2", "77.8")), (32, 100, ("35.0", "48.4"))]
)
def test_the_time_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str], text: int, out: int, rates: tuple[str, str]
) -> None:
    words = (
        f"--model llava-1.5-7b --images 1 --text-tokens {text} --output-tokens {out} --cliffs 22"
    )
    scale.main(words.split())
    table = [row.split("|") for row in capsys.readouterr().out.splitlines() if "|" in row]
    at = [cell.strip() for cell in table[0]].index("requests/s per GPU")
    assert tuple(row[at].strip() for row in table[2:]) == rates
    assert all(rate in PAGE for rate in rates)
    count = 16017 if out == 4 else 500
    for rate in rates:
        assert f"{count / float(rate):.0f} s" in PAGE

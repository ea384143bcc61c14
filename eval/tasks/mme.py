"""MME: two yes/no questions about each picture, in fourteen subtasks. (Fu et al., arXiv 2306.13394)

Rule: the benchmark's eval_tool, calculation.py. A subtask's points are its accuracy plus its accuracy+ (the
share of pictures with both questions right), 200 at most; perception is the sum over ten subtasks, cognition
over four. Metrics are shares of these full marks: 2000, 800 and 200 points. The prompts are LLaVA's:
the questions' own request goes, and a word or phrase is asked for.

Layouts read:

- official: a folder per subtask in the directory, or in its `MME_Benchmark_release_version`, `MME_Benchmark` or
  the second in the first; in it text files of lines question, tab, answer, each beside its picture, or in
  `questions_answers_YN` and the pictures in `images`;
- hub (lmms-lab/MME): `test-*.parquet` with the columns question_id, image, question, answer, category.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from vllm_flow.counts import counted
from vllm_flow.eval.tasks.base import (
    Item,
    Metrics,
    Scored,
    Task,
    Totals,
    counts_of,
    ratio,
    whole_bundles,
    with_counts,
)
from vllm_flow.eval.tasks.parquet import parquet_files, parquet_rows
from vllm_flow.eval.tasks.pictures import parquet_image
from vllm_flow.eval.tasks.prompts import short_answer
from vllm_flow.eval.tasks.reading import DataError, brief, directory, read_text

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
FOLDERS = (
    ".",
    "MME_Benchmark_release_version",
    "MME_Benchmark_release_version/MME_Benchmark",
    "MME_Benchmark",
)
REQUEST = "Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")


def parse_yes_no(text: str) -> str:
    """`yes`, `no` or `other`: which of the two stands in the first four characters, yes first.

    So `Know` is no, `Eyes` is yes, and `It is no` other.
    """
    head = text.lower()[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


@dataclass(frozen=True)
class Mme(Task):
    """MME. An item's group is its subtask, its id `subtask/picture#1` or `#2`."""

    name = "mme"
    prompts: str = "llava"

    max_tokens = 128
    headline = "perception"
    full_marks = MappingProxyType(
        {"perception": 2000.0, "cognition": 800.0, **dict.fromkeys(SUBTASKS, 200.0)}
    )
    parts = MappingProxyType(
        {"perception": PERCEPTION, "cognition": COGNITION, **{name: (name,) for name in SUBTASKS}}
    )
    unclear = "begin with neither yes nor no as the official rule reads them and count as wrong"

    def read(self, data: Path) -> list[Item]:
        data = directory(data)
        for folder in FOLDERS:
            found = [
                (data / folder / name, name) for name in SUBTASKS if (data / folder / name).is_dir()
            ]
            if found:
                return [item for path, name in found for item in self._official(path, name)]
        files = parquet_files(data, "test-*.parquet")
        if not files:
            raise DataError(
                f"{data}: neither folders of MME's subtasks (existence, count, ...; here or in "
                f"{', '.join(FOLDERS[1:])}) nor test-*.parquet of lmms-lab/MME"
            )
        return self._hub(files)

    def _official(self, folder: Path, subtask: str) -> Iterator[Item]:
        apart = (folder / "questions_answers_YN").is_dir()
        texts = sorted((folder / "questions_answers_YN" if apart else folder).glob("*.txt"))
        if not texts:
            raise DataError(f"{folder}: no questions (*.txt) in it")
        for path in texts:
            beside = (folder / "images" if apart else folder) / path.stem
            kinds = [kind for kind in PICTURES if beside.with_name(beside.name + kind).is_file()]
            image = beside.with_name(beside.name + (kinds[0] if kinds else ".jpg"))
            lines = [line for line in read_text(path).split("\n") if line.strip()]
            if len(lines) != 2:
                raise DataError(f"{path}: {counted(len(lines), 'question')}, not two")
            for number, line in enumerate(lines, 1):
                question, tab, answer = line.strip().partition("\t")
                if not tab:
                    raise DataError(f"{path}, line {number}: no tab between question and answer")
                place = f"{path}, line {number}"
                yield self._item(place, subtask, image.name, number, question, answer, str(image))

    def _hub(self, files: Iterable[Path]) -> list[Item]:
        items: list[Item] = []
        seen: dict[tuple[str, str], int] = {}
        for path in files:
            columns = ("question_id", "question", "answer", "category")
            for number, row in enumerate(parquet_rows(path, columns)):
                subtask = row.get("category", str)
                name = row.get("question_id", str).rpartition("/")[2]
                order = seen[subtask, name] = seen.get((subtask, name), 0) + 1
                question, answer = row.get("question", str), row.get("answer", str)
                image = parquet_image(path, number)
                items.append(self._item(row.place, subtask, name, order, question, answer, image))
        odd = [f"{subtask}/{name}" for (subtask, name), count in seen.items() if count != 2]
        if odd:
            raise DataError(f"{files}: {odd[0]} has not two questions")
        return items

    def _item(
        self,
        place: str,
        subtask: str,
        name: str,
        number: int,
        question: str,
        answer: str,
        image: str,
    ) -> Item:
        label = answer.strip().lower().rstrip(".")
        if subtask not in SUBTASKS:
            raise DataError(f"{place}: unknown subtask {brief(subtask)}")
        if label not in ("yes", "no"):
            raise DataError(f"{place}: the answer is {brief(answer)}, neither yes nor no")
        picture = f"{subtask}/{name}"
        truth = {"label": label, "question": question, "question_id": picture, "image_id": picture}
        text = question.strip()
        if self.prompts == "llava":
            text = short_answer(text.replace(REQUEST, "").strip())
        return Item(f"{picture}#{number}", text, image, truth, subtask)

    def bundle(self, item: Item) -> tuple[str, int]:
        return (item.truth["image_id"], 2)

    def score(self, item: Item, text: str) -> Scored:
        said = parse_yes_no(text)
        right = float(said == item.truth["label"])
        counts = {f"asked_{item.group}": 1.0, f"right_{item.group}": right}
        return Scored(item.id, said, right, counts, item.group, said == "other", self.bundle(item))

    def together(self, scored: Iterable[Scored]) -> list[Scored]:
        scored = list(scored)
        pairs = {}
        for one, other in whole_bundles(scored):
            both = float(one.score + other.score == 2)
            pairs[one.id] = {f"pictures_{one.group}": 1.0, f"both_{one.group}": both}
        return with_counts(scored, pairs)

    def metrics(self, totals: Totals) -> Metrics:
        """Shares of the full marks; perception and cognition over the subtasks that have answers."""
        points, there = {}, {}
        for name in SUBTASKS:
            parts = ("right", "asked", "both", "pictures")
            right, asked, both, pictures = counts_of(totals, *(f"{part}_{name}" for part in parts))
            points[name] = (ratio(right, asked) + ratio(both, pictures)) / 2
            there[name] = ratio(asked, asked)
        metrics: Metrics = {
            kind: ratio(sum(points[name] for name in names), sum(there[name] for name in names))
            for kind, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        return metrics | points


TASK = Mme()

"""AMBER: look-up rules word by word, with a stand-in for word vectors, and its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.eval import files
from vllm_flow.eval.tasks import amber, get_task, language
from vllm_flow.eval.tasks.amber import Words, judge
from vllm_flow.eval.tasks.base import sum_counts
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError

RELATIONS = {
    "forest": ["tree", "leave"], "tree": ["branch"], "sky": [], "person": ["man", "woman"], "dog": ["puppy"],
    "cloud": [], "road": ["street"],
}  # fmt: skip
NEAR = {("street", "road"), ("cat", "dog"), ("branch", "forest"), ("dog", "person")}


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Word vectors that know four pairs, and that a word is itself."""

    def similarity(one: str, other: str) -> float:
        return 1.0 if one == other else 0.9 if (one, other) in NEAR else 0.8

    monkeypatch.setattr(amber, "similarity", similarity)


@pytest.fixture
def nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nouns by a list: nltk's tagger and WordNet may not be on this machine."""
    known = {
        "men": "man",
        "dogs": "dog",
        "streets": "street",
        "cloud": "cloud",
        "table": "table",
        "Dogs": "Dogs",
    }

    def found(text: str) -> list[str]:
        words = (word.strip(".,") for word in text.split())
        return [known[word] for word in words if word in known]

    monkeypatch.setattr(amber, "nouns", found)


def look(said: list[str], truth: list[str], hallu: list[str], near: bool = True) -> tuple:
    sides = (Words.of(objects, RELATIONS) for objects in (truth, hallu))
    wrong, covered, expected = judge(said, *sides, frozenset({"line"}), near)
    return wrong, sorted(covered), sorted(expected)


# inference.py of junyangwang0410/AMBER 534babf.
CASES = [
    (["sky"], ["sky"], [], ([], [0], [])),
    (["sky", "sky"], ["sky"], [], ([], [0], [])),
    (["cloud", "cloud"], ["sky"], ["cloud"], (["cloud", "cloud"], [], [0])),  # every mention counts
    (["line"], ["sky"], ["cloud"], ([], [], [])),  # a safe word
    (["man"], ["person"], [], ([], [0], [])),  # an associate
    (["tree"], ["forest", "tree"], [], ([], [0], [])),  # an earlier object's associate comes first
    (["tree"], ["tree", "forest"], [], ([], [1], [])),  # associates come before objects
    (["sky"], ["sky", "sky"], [], ([], [0], [])),  # a repeated object is covered once
    (["puppy"], ["sky"], ["dog"], (["puppy"], [], [0])),
    (["cat"], ["dog"], [], ([], [0], [])),  # a near synonym
    (["cat"], ["sky"], ["dog"], (["cat"], [], [0])),
    (["dog"], ["person"], ["dog"], ([], [0], [0])),  # expected to be invented, and near an object: both
    (["branch"], ["tree", "forest"], [], ([], [0], [])),  # found exactly: nothing near is looked for
    (["street"], ["sky"], [], (["street"], [], [])),
    ([], ["sky"], ["dog"], ([], [], [])),
]  # fmt: skip


@pytest.mark.parametrize(("said", "truth", "hallu", "expected"), CASES)
def test_look_up(
    said: list[str], truth: list[str], hallu: list[str], expected: tuple, vectors: None
) -> None:
    assert look(said, truth, hallu) == expected


def test_without_vectors() -> None:
    assert look(["cat"], ["dog"], [], near=False) == (["cat"], [], [])
    assert look(["dog"], ["person"], ["dog"], near=False) == (["dog"], [], [0])


def benchmark(folder: Path) -> Path:
    rows = [
        {"id": 1, "type": "generative", "truth": ["person", "sky"], "hallu": ["cloud", "dog"]},
        {"id": 2, "type": "generative", "truth": ["road"], "hallu": []},
        {"id": 3, "type": "discriminative-relation", "truth": "yes"},
    ]
    files.json_file(folder / "annotations.json", rows)
    files.json_file(folder / "relation.json", RELATIONS)
    (folder / "safe_words.txt").write_text("line\norange")
    queries = [
        {"id": n, "image": f"AMBER_{n}.jpg", "query": "Describe this image."} for n in (1, 2)
    ]
    files.json_file(folder / "query/query_generative.json", queries)
    files.image_file(folder.parent / "image/AMBER_1.jpg")
    return folder


def test_files_and_metrics(tmp_path: Path, vectors: None, nouns: None) -> None:
    benchmark(tmp_path / "data")
    for name in ("amber", "amber-words"):
        task = get_task(name)
        items = task.read(tmp_path)
        assert [(i.id, i.text) for i in items] == [
            ("1", "Describe this image."),
            ("2", "Describe this image."),
        ]
        assert load_image(items[0].image).size == (3, 2), "beside the data"
        said = ["Two men and dogs under a cloud, a table.", "Dogs on the streets."]
        scored = [task.score(i, text) for i, text in zip(items, said, strict=True)]
        assert scored[0].parsed["mentioned"] == ["man", "dog", "cloud"]
        # `dog` is near `person` by the stand-in; `Dogs` has a capital, the vocabulary has none.
        invented = ["cloud"] if name == "amber" else ["dog", "cloud"]
        assert scored[0].parsed["invented"] == invented
        assert scored[1].parsed == {"mentioned": ["street"], "invented": []}
        found = task.metrics(sum_counts(scored))
        assert found["chair"] == pytest.approx(len(invented) / 4)
        assert found["cover"] == pytest.approx(2 / 3) and found["hal"] == 0.5
        assert found["cog"] == 1.0


def test_an_object_without_associates_is_refused(tmp_path: Path) -> None:
    folder = benchmark(tmp_path)
    rows = [{"id": 1, "type": "generative", "truth": ["ship"], "hallu": []}]
    files.json_file(folder / "annotations.json", rows)
    with pytest.raises(DataError, match="record 0: ship: not in relation.json"):
        get_task("amber").read(folder)
    files.json_file(folder / "annotations.json", [rows[0] | {"truth": ["sky"]}])
    with pytest.raises(DataError, match="has no annotation 2"):
        get_task("amber").read(folder)


def test_missing_vectors_are_told_before_anything_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nouns: None
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "spacy", None)
    language._vectors.cache_clear()
    language.similarity.cache_clear()
    item = get_task("amber").read(benchmark(tmp_path))[0]
    with pytest.raises(DataError, match="en_core_web_lg.*amber-words"):
        get_task("amber").score(item, "nothing of the vocabulary")


def test_nouns(monkeypatch: pytest.MonkeyPatch) -> None:
    """extract_nouns: tokens with a noun's tag, in order and with their case, lemmatised as nouns."""
    import nltk

    tags = {"Dogs": "NNS", "run": "VBP", "fast": "RB", "Anna": "NNP", "dogs": "NNS", ".": "."}
    monkeypatch.setattr(nltk, "pos_tag", lambda tokens: [(token, tags[token]) for token in tokens])

    class Lemmatiser:
        def lemmatize(self, word: str, pos: str = "n") -> str:
            return {"dogs": "dog"}.get(word, word)

    monkeypatch.setattr(language, "_lemmatiser", Lemmatiser)
    assert language.nouns("Dogs run fast. Anna run. dogs.") == ["Dogs", "Anna", "dog"]

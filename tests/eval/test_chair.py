"""CHAIR: the words of captions case by case, what is in an image, both rules, both layouts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.eval import files
from vllm_flow.eval.tasks import get_task, language
from vllm_flow.eval.tasks.base import sum_counts
from vllm_flow.eval.tasks.chair import (
    PAIRS,
    Chair,
    coco_truth,
    join_pairs,
    objects_among,
    read_caption,
    synonyms,
)
from vllm_flow.eval.tasks.pictures import load_image
from vllm_flow.eval.tasks.reading import DataError

TASK = get_task("chair")

CAPTIONS = [
    # Nothing, and words that are no objects.
    ("", ""), (".", ""), ("A picture of the sky.", ""), ("Trees and grass", ""), ("\n", ""),
    # Objects, synonyms, plurals, repetition, case.
    ("A dog.", "dog"), ("DOGS", "dog"), ("dog dog Dog", "dog dog dog"), ("a puppy", "dog"), ("puppies", "dog"),
    ("two men and a woman", "person person"), ("people", "person"), ("children playing", "person"),
    ("a person", "person"), ("persons", "person"), ("a baby", "person"), ("the bride and groom", "person person"),
    ("knives and forks", "knife fork"), ("a knife", "knife"), ("sheep", "sheep"), ("a lamb", "sheep"),
    ("geese", "bird"), ("an ox, two oxen", "cow cow"), ("skis", "skis"), ("a ski", "skis"), ("scissors", "scissors"),
    ("bananas, apples, oranges", "banana apple orange"), ("broccoli", "broccoli"), ("a TV", "tv"),
    ("televisions", "tv"), ("a couch and a sofa", "couch couch"), ("couches", "couch"), ("benches", "bench"),
    ("toothbrushes", "toothbrush"), ("a toothbrush", "toothbrush"), ("donuts", "donut"), ("a doughnut", "donut"),
    ("sandwiches", "sandwich"), ("buses", "bus"), ("minibuses", "bus"), ("airbuses", "airplane"),
    ("watches the clock", "clock"), ("vases", "vase"), ("mice", "mouse"), ("a computer mouse", "laptop mouse"),
    ("refrigerators", "refrigerator"), ("the fridge", "refrigerator"), ("a bowl in a container", "bowl bowl"),
    ("remotes", "remote"), ("desk, table", "dining table dining table"), ("a dining table", "dining table"),
    ("a monitor", "tv"), ("a laptop", "laptop"), ("seat", "chair"), ("stools", "chair"), ("taxis", "car"),
    ("a suv", "car"), ("vans", "car"), ("locomotives", "train"), ("ships", "boat"), ("the ferry", "boat"),
    ("a ferryboat", "boat"), ("hydrants", "fire hydrant"), ("kites", "kite"), ("umbrellas", "umbrella"),
    ("luggage", "suitcase"), ("a bag", ""), ("wallets", "handbag"), ("cups", "cup"), ("glasses", ""),
    ("elephants", "elephant"), ("a panda", "bear"), ("collies", ""), ("a collie", "dog"), ("doggies", ""),
    # Singulars that the rule destroys.
    ("a bus", ""), ("a wine glass", "wine glass"), ("wine glasses", "wine glass"), ("a glass of wine", ""),
    ("tennis racket", "tennis racket"), ("a minibus", ""), ("an airbus", ""), ("a waitress", ""),
    # Double words.
    ("a traffic light", "traffic light"), ("traffic lights", "traffic light"), ("a street light", "traffic light"),
    ("a stop sign", "stop sign"), ("stop signs", "stop sign"), ("a sign", ""), ("hot dogs", "hot dog"),
    ("a hot-dog", ""), ("hot, dog", "dog"), ("a hot\ndog", "hot dog"), ("hot dog dog", "hot dog dog"),
    ("teddy bears", "teddy bear"), ("a teddy", ""), ("teddy bear bear", "teddy bear bear"),
    ("cell phones", "cell phone"), ("mobile phone", "cell phone"), ("a phone", "cell phone"),
    ("a smartphone", "cell phone"), ("an iPhone", ""), ("a laptop computer", "laptop"),
    ("fire hydrants", "fire hydrant"), ("parking meters", "parking meter"), ("a meter", ""),
    ("a baseball bat", "baseball bat"), ("a bat", ""), ("baseball gloves", "baseball glove"),
    ("home plate", ""), ("train tracks", ""), ("a train on tracks", "train"), ("train track train", "train"),
    ("a motor bike", ""), ("a motorbike", "motorcycle"), ("motor cycle", "motorcycle"), ("air planes", "airplane"),
    ("potted plants", "potted plant"), ("a plant", ""), ("hair driers", "hair drier"), ("a hairdryer", "hair drier"),
    ("sports ball", "sports ball"), ("a ball", "sports ball"), ("suit case", "suitcase"),
    ("stove top oven", "oven oven"),
    ("a stovetop", "oven"), ("a bow tie", "tie"), ("a bow", "tie"), ("a bow and a tie", "tie tie"),
    ("a cheesecake", ""), ("a cupcake", "cake"), ("wine glasses glass", "wine glass"),
    # Qualified animals and vehicles.
    ("a baby elephant", "elephant"), ("an adult cow", "cow"), ("adult sheep", "sheep"), ("baby bears", "bear"),
    ("a baby animal", ""), ("an adult cub", ""), ("a baby lamb", "person sheep"), ("a baby and a dog", "person dog"),
    ("passenger train", "train"), ("a passenger jet", "airplane"), ("passenger jets", "airplane"),
    ("a passenger plane", "person airplane"), ("passengers train", "train"), ("adult birds.", "bird"),
    # A toilet's seat is no chair.
    ("a toilet seat", "toilet"), ("the seat of the toilet", "toilet"), ("a toilet and a chair", "toilet chair"),
    ("a seat. A toilet.", "toilet"), ("seats and toilets", "toilet"), ("a urinal and a seat", "toilet chair"),
    ("a toilet, a stool", "toilet chair"), ("toilet seats and a seat", "toilet"),
    # Tokens: sentences come first, so a full stop inside the text leaves its word.
    ("A cat. A dog. A car", "cat dog car"), ("a cat.A dog", "dog"), ("a cat.", "cat"),
    ("cat, dog; car!", "cat dog car"),
    ("the man's dog", "person dog"), ("the dogs' bowl", "dog bowl"), ("dog-sled", ""), ("(dog)", "dog"),
    ("'dog'", "dog"), ('"dog"', "dog"), ("dog/cat", ""), ("dog\u2014cat", "dog cat"), ("1. Dog 2. Cat", "dog cat"),
    ("the dog is at a table. the cat sits", "dog dining table cat"), ("**dog**", "dog"), ("dog...", "dog"),
]  # fmt: skip


@pytest.mark.parametrize(("caption", "objects"), CAPTIONS)
def test_objects_by_the_official_rule(caption: str, objects: str) -> None:
    found = read_caption(caption, "official").objects
    assert " ".join(found) == objects


LENGTHS = [
    ("", 0), ("A dog.", 3), ("A dog. A cat.", 6), ("A hot dog.", 3), ("a toilet seat", 2),
    ("the seat of the toilet", 5),
    ("the man's dog", 4), ("don't", 2), ("two wine glasses, three", 4), ("baby bear", 1), ("no... yes", 3),
]  # fmt: skip


@pytest.mark.parametrize(("caption", "length"), LENGTHS)
def test_length(caption: str, length: int) -> None:
    """Punctuation counts, a double word is one, a toilet's seat still counts."""
    assert read_caption(caption, "official").length == length


def test_tables() -> None:
    table = synonyms()
    assert len(set(table.values())) == 80
    assert len(table) == 403
    assert all(table[node] == node for node in table.values())
    assert table[" motor bike"] == "motorcycle" and "motor bike" not in table
    assert len(PAIRS) == 25 + 2 * 12 + 2 + 3
    assert all(len(pair.split(" ")) == 2 for pair in PAIRS)


TOKENS = [
    "baby",
    "adult",
    "bear",
    "seat",
    "toilet",
    "hot",
    "dog",
    "wine",
    "glas",
    "bow",
    "tie",
    "x",
]


@given(
    st.lists(
        st.sampled_from(TOKENS),
        max_size=9,
    )
)
def test_pairs_are_joined_from_the_left(tokens: list[str]) -> None:
    """Against a slower reading: look at the first two, cut, look again."""
    rest, expected = list(tokens), []
    while rest:
        first_two = rest[0] + " " + rest[1] if len(rest) > 1 else ""
        taken = 2 if first_two in PAIRS else 1
        expected.append(PAIRS[first_two] if taken == 2 else rest[0])
        rest = rest[taken:]
    joined = join_pairs(tokens)
    assert joined == expected
    kept = [t for t in joined if not (t == "seat" and "toilet" in joined)]
    assert objects_among(joined) == [synonyms()[t] for t in kept if t in synonyms()]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    return files.coco(
        tmp_path / "annotations",
        {
            "val": {
                7: (["dog", "chair"], ["Two men with a puppy.", "A sofa"]),
                8: ([], []),
                9: (["wine glass"], ["bow ties", "a toilet seat"]),
            },
            "train": {5: (["bus"], ["A cat"])},
        },
    )


def test_what_is_in_an_image(annotations: Path) -> None:
    truth = coco_truth(annotations, "official")
    assert truth.objects == {
        5: {"bus", "cat"},
        7: {"dog", "chair", "person", "couch"},
        8: set(),
        9: {"wine glass", "tie", "toilet"},
    }
    assert truth.files[5] == "COCO_train2014_000000000005.jpg"
    assert coco_truth(annotations.parent, "official", {9}).objects.keys() == {9}


def test_both_splits_add_up(tmp_path: Path) -> None:
    files.coco(tmp_path, {"val": {1: (["dog"], ["a cat"])}, "train": {1: (["car"], ["a tie"])}})
    assert coco_truth(tmp_path, "official").objects == {1: {"dog", "cat", "car", "tie"}}


def test_scores(annotations: Path) -> None:
    truth = coco_truth(annotations, "official").objects
    cases = {
        7: "A dog, a dog, a cat, a fork and a fork.",  # five mentions, three wrong; dog of four objects
        8: "A man.",
        9: "Nothing but sky.",
    }
    scored = [TASK.score(TASK.item(i, truth[i], None), text) for i, text in cases.items()]
    assert [one.score for one in scored] == [pytest.approx(2 / 5), 0.0, 1.0]
    assert scored[0].parsed == {
        "mentioned": ["dog", "dog", "cat", "fork", "fork"],
        "hallucinated": ["cat", "fork", "fork"],
    }
    metrics = TASK.metrics(sum_counts(scored))
    assert metrics == {
        "chair_s": pytest.approx(2 / 3),
        "chair_i": pytest.approx(4 / 6),
        "recall": pytest.approx(1 / 7),
        "len": pytest.approx((15 + 3 + 4) / 3),
    }
    assert set(TASK.metrics({}).values()) == {0.0}


def test_official_layout(annotations: Path) -> None:
    data = annotations.parent
    files.image_file(data / "val2014/COCO_val2014_000000000007.jpg", (7, 7, 7))
    items = TASK.read(data)
    assert [item.id for item in items] == ["7", "8", "9"]
    assert load_image(items[0].image).getpixel((0, 0)) == (7, 7, 7)
    assert items[0].truth == {"image_id": 7, "objects": ["chair", "couch", "dog", "person"]}
    assert {item.text for item in items} == {"Please describe this image in detail."}
    assert len(Chair(sample=2).read(data)) == 2
    (data / "chair_images.txt").write_text("9\n7\n")
    assert [item.id for item in TASK.read(data)] == ["9", "7"]


def test_the_draw_depends_on_the_seed_alone(tmp_path: Path) -> None:
    files.coco(tmp_path, {"val": {n: ([], []) for n in range(100, 140)}})
    draws = [[i.id for i in Chair(sample=10, seed=s).read(tmp_path)] for s in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    assert len(set(draws[0])) == 10


def test_hub_layout(tmp_path: Path) -> None:
    rows = [
        {"question_id": 7, "gt_object": ["dog", "tv"], "image": files.hub_image((1, 0, 0))},
        {"question_id": 8, "gt_object": [], "image": files.hub_image((2, 0, 0))},
    ]
    files.parquet(tmp_path / "data/test-00000-of-00001.parquet", rows)
    items = TASK.read(tmp_path)
    assert [item.truth["objects"] for item in items] == [["dog", "tv"], []]
    assert load_image(items[1].image).getpixel((0, 0)) == (2, 0, 0)


def test_bad_files_are_named(annotations: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs instances_val2014.json"):
        coco_truth(tmp_path / "x", "official")
    (annotations / "captions_train2014.json").unlink()
    with pytest.raises(DataError, match=r"captions_train2014.json: no such file"):
        coco_truth(annotations, "official")
    (annotations / "instances_train2014.json").unlink()
    (annotations.parent / "chair_images.txt").write_text("7\n123\n")
    with pytest.raises(DataError, match=r"chair_images.txt: not in COCO's annotations: 123"):
        TASK.read(annotations.parent)
    (annotations.parent / "chair_images.txt").write_text("7\nx\n")
    with pytest.raises(DataError, match="line 2: 'x' is no image id"):
        TASK.read(annotations.parent)


def test_opera_lemmas_follow_the_part_of_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping to WordNet's parts; tagger and WordNet themselves are nltk's."""
    import nltk

    class Lemmatiser:
        def lemmatize(self, word: str, part: str) -> str:
            return f"{word}/{part}"

    tags = ["JJ", "JJR", "VBG", "NN", "NNS", "RB", "RP", "DT", "."]
    monkeypatch.setattr(nltk, "pos_tag", lambda words: list(zip(words, tags, strict=True)))
    monkeypatch.setattr(language, "_lemmatiser", Lemmatiser)
    lemmas = language.wordnet_lemmas(list("abcdefghi"))
    assert lemmas == ["a/a", "b/a", "c/v", "d/n", "e/n", "f/r", "g/r", "h/n", "i/n"]


def test_opera_lemmas() -> None:
    """With nltk's tagger and WordNet, where they are."""
    try:
        found = read_caption("A bus drives past two men who are skiing in glasses", "opera")
    except language.MissingLanguageData as error:
        pytest.skip(str(error))
    assert found.objects == ["bus", "person"]


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lambda: language.tokenise("A cat. A dog."), "punkt_tab"),
        (lambda: language.wordnet_lemmas(["a", "cat"]), "averaged_perceptron_tagger_eng"),
    ],
)
def test_missing_data_is_said_with_its_remedy(call, package, monkeypatch, tmp_path) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    nltk.tokenize._get_punkt_tokenizer.cache_clear()
    language._tokens.cache_clear()
    with pytest.raises(language.MissingLanguageData, match=f"nltk.downloader {package}"):
        call()
    nltk.tokenize._get_punkt_tokenizer.cache_clear()

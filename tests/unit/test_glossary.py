"""The glossary's drawing is what the code computes, and has every term of the page on it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "glossary.md"
SVG = "{http://www.w3.org/2000/svg}"


def drawing() -> ModuleType:
    """docs/site/drawing.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("drawing", ROOT / "docs/site/drawing.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_drawing_is_what_the_code_computes() -> None:
    """If this fails after a change of layouts or plans: run the script, and look at the picture."""
    assert (ROOT / "docs" / "glossary.svg").read_text(encoding="utf-8") == drawing().draw()


def test_every_term_is_on_the_drawing() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| (.+) \| .*\|$", PAGE.read_text(), re.MULTILINE)
    terms = {term for term, meaning in rows if term != "term"}
    assert len(terms) > 20
    tree = ElementTree.parse(ROOT / "docs" / "glossary.svg")
    drawn = {str(part.text).strip(" :") for part in tree.iter(f"{SVG}tspan")}
    missing = {term for term in terms if not {term, f"{term}s"} & drawn}
    assert not missing


def test_no_text_runs_over_the_edge() -> None:
    """By the width of an average character of the font; the picture has no scroll bar."""
    tree = ElementTree.parse(ROOT / "docs" / "glossary.svg")
    width = float(tree.getroot().attrib["viewBox"].split()[2])
    for text in tree.iter(f"{SVG}text"):
        x, size = float(text.attrib["x"]), float(text.attrib["font-size"])
        length = 0.56 * size * len("".join(text.itertext()))
        if text.attrib["text-anchor"] == "start":
            assert x + length <= width, "".join(text.itertext())
        elif text.attrib["text-anchor"] == "end":
            assert x - length >= 0, "".join(text.itertext())


@pytest.mark.parametrize(
    "module", ["layout.py", "plan.py", "engine/core/storage.py", "engine/core/prefix.py"]
)
def test_who_uses_the_words_says_where_they_are_explained(module: str) -> None:
    docstring = (ROOT / "vllm_flow" / module).read_text(encoding="utf-8").split('"""')[1]
    assert "docs/glossary.md" in docstring

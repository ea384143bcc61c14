"""The documentation's links lead somewhere, and the modules it names are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for folder in ("", "docs", "docs/results", "patches", "vllm_flow/demo_model")
    for page in (ROOT / folder).glob("*.md")
)
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):`~?(vllm_flow\.[\w.]+)`")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_what_is_nested_in_a_list_is_so_on_the_site(page: Path) -> None:
    """Python's Markdown wants four spaces, with fewer an item is the outer list's next; code hosts take four, too."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    shallow = re.findall(r"^ {1,3}(?:[-*|] ?|\d+\. ).*|(?<=\n\n) {1,3}\S.*", text, re.MULTILINE)
    assert not shallow


def defined(tree: ast.Module | ast.ClassDef, names: list[str]) -> bool:
    """Whether a module, or a class, has a name, dotted for what is in a class."""
    for node in ast.walk(tree) if isinstance(tree, ast.Module) else tree.body:
        if getattr(node, "name", None) == names[0]:
            inside = names[1:]
            return not inside or (isinstance(node, ast.ClassDef) and defined(node, inside))
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        if any(getattr(target, "id", None) == names[0] for target in targets):
            return len(names) == 1
    return False


def test_references_in_docstrings_lead_somewhere() -> None:
    """Those with the module's name, as the site's reference shows them."""
    broken = []
    for folder in ("vllm_flow", "eval", "patches"):
        for path in (ROOT / folder).glob("**/*.py"):
            for target in ROLE.findall(path.read_text(encoding="utf-8")):
                *module, name = target.split(".")
                while not (file := (ROOT / "/".join(module)).with_suffix(".py")).is_file():
                    if (file := ROOT.joinpath(*module, "__init__.py")).is_file() or not module:
                        break
                    name = f"{module.pop()}.{name}"
                there = file.is_file() and defined(ast.parse(file.read_text()), name.split("."))
                if not there and not (ROOT / target.replace(".", "/")).with_suffix(".py").is_file():
                    broken.append((path.relative_to(ROOT).as_posix(), target))
    assert not broken


def test_every_module_has_its_sentence() -> None:
    """docs/structures.md names every module of the package, by its file name or a pattern like `cliff_*.py`."""
    text = (ROOT / "docs/structures.md").read_text(encoding="utf-8")
    named: set[tuple[str, str]] = set()
    room = ""
    for line in text.splitlines():
        if line.startswith("## "):
            found = re.match(r"## `([\w/]+)`", line)
            room = found[1] if found else ""
        named |= {(room, name) for name in re.findall(r"`([\w/*]+\.py)`", line)}
    patterns = [
        re.compile((room + "/" if room else "") + name.replace("*", ".*").replace("NAME", ".*"))
        for room, name in named
    ]
    modules = [
        module
        for folder in (
            "vllm_flow/*.py",
            "vllm_flow/engine/**/*.py",
            "vllm_flow/*/*.py",
            "eval/**/*.py",
        )
        for module in ROOT.glob(folder)
        if module.name != "__init__.py" and not module.parent.is_symlink()
    ]
    missing = [
        module.relative_to(ROOT).as_posix()
        for module in modules
        if not any(pattern.fullmatch(module.relative_to(ROOT).as_posix()) for pattern in patterns)
    ]
    assert not missing


def test_no_module_has_two_sentences() -> None:
    rooms = (ROOT / "docs/structures.md").read_text(encoding="utf-8").split("\n## ")
    for room in rooms:
        firsts = [line.split("|")[1] for line in room.splitlines() if line.startswith("| `")]
        names = [name for first in firsts for name in re.findall(r"`([\w/*.]+)`", first)]
        assert len(set(names)) == len(names), room.splitlines()[0]

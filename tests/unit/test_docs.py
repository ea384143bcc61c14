"""The documentation's links lead somewhere, and the modules it names are there."""

from __future__ import annotations

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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    links = LINK.findall(page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken


def test_every_module_has_its_sentence() -> None:
    """docs/structures.md names every module of the package, by its file name or a pattern like `cliff_*.py`."""
    text = (ROOT / "docs/structures.md").read_text(encoding="utf-8")
    named = [
        name.removeprefix("vllm_flow/").removeprefix("eval/")
        for name in re.findall(r"`([\w/*]+\.py)`", text)
    ]
    patterns = [re.compile(name.replace("*", ".*").replace("NAME", ".*")) for name in named]
    modules = [
        module
        for folder in (
            "vllm_flow",
            "vllm_flow/engine",
            "vllm_flow/analysis",
            "vllm_flow/profile",
            "eval",
        )
        for module in (ROOT / folder).glob("*.py")
        if module.name != "__init__.py"
    ]
    missing = [
        module.relative_to(ROOT).as_posix()
        for module in modules
        if not any(pattern.fullmatch(module.name) for pattern in patterns)
    ]
    assert not missing

"""Pages for operators: errors that are quoted are the code's, and queries are those of dashboard and alerts."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
TABLE_ROW = re.compile(r"^\| (?!---)(.+?) \| .* \|$", re.MULTILINE)
QUOTED = re.compile(r'(?<!\w)"([^"]+)"')
HELD = "\0"
"""In the place of what an f-string fills in."""


@cache
def literals() -> tuple[str, ...]:
    """Every string of the package's code, f-strings with a mark where values go."""
    found = []
    for folder in ("vllm_flow", "patches", "eval"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (getattr(value, "value", HELD) for value in node.values)
                    found.append("".join(p if isinstance(p, str) else HELD for p in parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return tuple(found)


def quotations() -> list[str]:
    """Of the first column of troubleshooting's tables."""
    page = re.sub(r"`[^`]*`", "", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"))
    return [text for row in TABLE_ROW.findall(page) for text in QUOTED.findall(row)]


def said(text: str) -> bool:
    """Whether some string has these words; "..." stands for anything."""
    pattern = ".*".join(re.escape(part.strip()) for part in text.split("..."))
    return any(re.search(pattern, literal, re.DOTALL) for literal in literals())


def test_there_are_quotations() -> None:
    """Else the test below looks at nothing."""
    assert len(quotations()) >= 25
    assert not said("the prompt ends with a picture token")


@pytest.mark.parametrize("text", quotations())
def test_an_error_that_is_quoted_is_one_that_is_raised(text: str) -> None:
    assert said(text)


def plain(query: str) -> str:
    """A query without the dashboard's choice of models and its ranges."""
    query = re.sub(r'model_name=~"\$model_name"(?:, )?', "", query).replace("{}", "")
    query = re.sub(r"\[(?:\$\w+|\d+[smhd])\]", "[RANGE]", query)
    return " ".join(query.split())


def test_queries_are_those_of_the_dashboard() -> None:
    dashboard = json.loads((DOCS / "grafana.json").read_text(encoding="utf-8"))
    known = {
        plain(target["expr"])
        for panel in dashboard["panels"]
        for target in panel.get("targets", ())
    }
    shown = [
        line
        for block in re.findall(
            r"```promql\n(.*?)```", (DOCS / "rollout.md").read_text(), re.DOTALL
        )
        for line in block.splitlines()
    ]
    assert len(shown) >= 10
    assert not [line for line in shown if plain(line) not in known]


def test_operating_has_every_alert() -> None:
    page = (DOCS / "operating.md").read_text(encoding="utf-8")
    rules = re.findall(r"- alert: (\w+)", (DOCS / "alerts.yml").read_text(encoding="utf-8"))
    assert re.findall(r"^\| `(VllmFlow\w+)` \|", page, re.MULTILINE) == rules

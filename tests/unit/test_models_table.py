"""`vllm-flow models`: its table is that of docs/models.md, and the README names the families."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from vllm_flow.cli import main
from vllm_flow.engine.families.known import FAMILIES
from vllm_flow.models_command import names, table
from vllm_flow.options import pixels
from vllm_flow.profile.dimensions import ModelShape
from vllm_flow.profile.picture_cost import TEXT_TOKENS, savings

ROOT = Path(__file__).parents[2]


def between_marks(page: str) -> str:
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.split("<!-- vllm-flow models -->")[1].split("<!-- /vllm-flow models -->")[0].strip()


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    assert between_marks("docs/models.md") == capsys.readouterr().out.strip()


def test_on_a_terminal_nothing_is_escaped_or_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["models"]) == 0
    columns = zip(
        *(line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if "│" in line),
        strict=True,
    )
    family, *_, stays, _, _ = ("".join(cell.strip() for cell in column) for column in columns)
    for known in FAMILIES:
        assert all(architecture in family for architecture in known.architectures)
    assert "<|vision_start|>" in stays and "[IMG_BREAK]" in stays and "&" not in stays


def test_without_rich_it_is_markdown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("vllm_flow.models_command.find_spec", lambda name: None)
    assert main(["models"]) == 0
    assert capsys.readouterr().out.startswith("| Family |")


def test_the_readme_names_the_families() -> None:
    assert between_marks("README.md") == names()


def test_a_size_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert pixels("640x480") == (640, 480)
    for text in ("640", "640x", "x480", "0x4", "-1x4", "a x b"):
        with pytest.raises(ArgumentTypeError, match="not a size such as 640x480"):
            pixels(text)
    assert main(["models", "--picture", "640x480"]) == 2
    assert "needs a model" in capsys.readouterr().err


def test_what_a_cliff_saves() -> None:
    """At cliff 0 the picture's share of the KV cache, and more than that of the rows' FLOPs: attention is quadratic."""
    shape = ModelShape(layers=32, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=128, vocab=100)
    rows = list(savings(shape, 3 * TEXT_TOKENS, range(0, 32, 4)))
    assert [cliff for cliff, _, _ in rows] == [0, 4, 8, 12, 16, 20, 24, 28]
    assert rows[0][2] == pytest.approx(0.75) and rows[0][1] > 0.7
    assert rows[4][2] == pytest.approx(0.375)
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
    assert [cliff for cliff, _, _ in savings(shape, 1, (0, 11, 22))] == [0, 11, 22]


def test_every_family_has_its_row_and_every_row_its_cells() -> None:
    head, _, *rows = table()
    assert len(rows) == len(FAMILIES)
    assert {row.count(" | ") for row in rows} == {head.count(" | ")}
    for family, row in zip(FAMILIES, rows, strict=True):
        assert all(f"`{name}`" in row for name in family.architectures)
        assert all(decoder in row for decoder in family.decoders)

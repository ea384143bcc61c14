"""`vllm-flow policies`: what it prints stands in docs/ranks.md and docs/presets.md, and is true of the registries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from vllm_flow.cli import main
from vllm_flow.policies_command import average, of_depth, preset_section, shared, tables
from vllm_flow.presets import PRESETS
from vllm_flow.ranks import RANKS

DOCS = Path(__file__).parents[2] / "docs"


def between_marks(page: str, mark: str) -> str:
    text = (DOCS / page).read_text(encoding="utf-8")
    return text.split(f"<!-- {mark} -->")[1].split(f"<!-- /{mark} -->")[0].strip()


def test_the_pages_show_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies"]) == 0
    ranks, presets = capsys.readouterr().out.strip().split("\n\n")
    assert between_marks("ranks.md", "vllm-flow policies: ranks") == ranks
    assert between_marks("presets.md", "vllm-flow policies: presets") == presets


def test_a_preset_and_a_rank_are_described_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    sections = ["\n".join(preset_section(preset)) for preset in PRESETS.values()]
    assert between_marks("presets.md", "vllm-flow policies NAME") == "\n\n".join(sections)

    assert main(["policies", "fastv", "last_image"]) == 0
    fastv, rank = capsys.readouterr().out.split("### rank ")
    assert fastv.strip() == sections[list(PRESETS).index("fastv")]
    assert rank.startswith("last_image\n\n- Keeps: what the image's last token attends to most.\n")

    # DART is a preset and the rank of its stage.
    assert main(["policies", "dart"]) == 0
    assert capsys.readouterr().out.count("\n### ") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fastvv"], "'fastvv' is no rank or preset; those are paper, "),
        (["fastv", "--layers", "28"], "leave out the names, or --layers"),
    ],
)
def test_what_cannot_be_described_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        assert main(["policies", *arguments]) != 0
    except SystemExit as stopped:
        assert stopped.code
    assert said in capsys.readouterr().err


def test_every_rank_and_preset_has_its_row_and_every_row_its_cells() -> None:
    ranks, presets = "\n".join(tables()).split("\n\n")
    for table, names in ((ranks, RANKS), (presets, PRESETS)):
        head, _, *rows = table.splitlines()
        assert [row.split("`")[1] for row in rows] == list(names)
        assert {row.count(" | ") for row in rows} == {head.count(" | ")}


def test_what_is_shared_follows_from_what_a_rank_needs() -> None:
    assert shared(RANKS["uniform"]) == "any prefix"
    assert shared(RANKS["diversity"]) == shared(RANKS["last_image"])
    assert shared(RANKS["last_image"]) == "any prefix that does not end inside an image"
    assert shared(RANKS["last_prompt"]).startswith("what is before the first image")


def test_presets_in_a_decoder_of_another_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policies", "--layers", "28"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == list(of_depth(28)) and len(lines) == len(PRESETS)
    fastv = next(line for line in lines if line.startswith("fastv "))
    said = "fastv 53.6% of the image tokens per layer 2:50% last_prompt"
    assert " ".join(fastv.split()) == said
    assert average(PRESETS["fastv"], 28) == 576 * (2 + 13) / 28
    with pytest.raises(SystemExit):
        main(["policies", "--layers", "0"])


def test_what_evicts_nothing_is_said() -> None:
    assert next(line for line in of_depth(1) if line.startswith("paper")).endswith(
        "nothing is evicted"
    )


def test_the_drawing_is_what_the_code_computes() -> None:
    """If this fails after a change of layouts: run docs/site/policies.py, and look at the picture."""
    spec = importlib.util.spec_from_file_location("policies_drawing", DOCS / "site/policies.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "policies.svg").read_text(encoding="utf-8") == module.draw()
    # They stand side by side since they cost the same.
    rows = {
        sum(policy.kept(layer, 0, module.TOKENS) for layer in range(module.LAYERS))
        for policy in map(module.policy_of, module.KEYS)
    }
    assert rows == {24}

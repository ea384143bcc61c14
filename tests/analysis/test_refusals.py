"""What `cam` and `figures` refuse, before a model is loaded and without taking a part of it silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_flow import cli
from vllm_flow.analysis.cam_command import device, spoken


@pytest.mark.parametrize("text", ["", " ", "\n\t"])
def test_a_question_of_nothing(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="it is empty; write a question"):
        spoken(text)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["cam", "--image", "x.png", "--prompt", text])
    assert "--prompt: it is empty" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["gpu", "cpu:x", "cuda:", "cuda:-1", "cuda:1²", "", "nonsense"])
def test_what_is_no_device(text: str) -> None:
    with pytest.raises(Exception, match="is no device: write cpu, cuda or cuda:1"):
        device(text)


@pytest.mark.parametrize(
    ("there", "fitting", "beyond", "said"),
    [(0, [], "cuda", "0 CUDA devices"), (1, ["cuda", "cuda:0"], "cuda:1", "1 CUDA device here")],
)
def test_a_device_that_is_not_there(
    there: int, fitting: list[str], beyond: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert device("cpu") == "cpu"
    assert [device(text) for text in fitting] == fitting
    with pytest.raises(Exception, match=said):
        device(beyond)


def test_a_request_where_no_attention_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "scores.csv").write_text("task,policy\n")
    assert cli.main(["figures", str(tmp_path), "--request", "7"]) == 2
    said = capsys.readouterr().err
    assert f"--request 7: there is no attention in {tmp_path}" in said
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.parametrize("damaged", [False, True])
def test_a_cam_that_cannot_be_read(
    damaged: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numpy takes what is no NPZ file for a pickle, and explains how to load that."""
    path = tmp_path / "cam.npz"
    np.savez(path, heat=np.arange(1000))
    content = path.read_bytes()
    path.write_bytes(content[:200] + b"?" + content[201:] if damaged else b"junk\n")
    assert cli.main(["figures", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert ("it is damaged" if damaged else "it is no NPZ file") in said and "pickle" not in said
    assert "`vllm-flow cam` writes them" in said

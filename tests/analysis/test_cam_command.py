"""`vllm-flow cam`: what it refuses, and the pictures, boxes, layers and colours that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image, ImageOps

from tests.analysis.conftest import PROMPT, SHAPE
from tests.engine import tiny_llava
from tests.unit.odd_pictures import png_of
from vllm_flow import cli
from vllm_flow.analysis import cam_command
from vllm_flow.analysis.cam_command import box_corners, colour, layer_numbers
from vllm_flow.analysis.cam_file import CamRecord


def test_cam_refuses_in_a_sentence(
    checkpoints: Path, image_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_llava.build(SHAPE, checkpoints))
    asked = ["cam", "--model", model, "--image", str(image_file), "--prompt", PROMPT,
             "--answer", " w7", "--samples", "0", "--device", "cpu", "--out", str(tmp_path)]  # fmt: skip
    for extra, says in (
        (["--layers", "9"], "layer 9 does not exist: this model has the layers 0 to 3"),
        (["--word", "w8"], "does not contain the word 'w8'"),
        (["--box", "0,0,17,4"], "not inside the picture of 16 x 16"),
        (["--prompt", "w1 w2"], "chat template"),
    ):
        assert cli.main([*asked, *extra]) == 2
        assert says in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        cli.main([*asked, "--sigma", "-1"])
    assert left.value.code == 2
    assert "--sigma: '-1' is no number" in capsys.readouterr().err
    assert cli.main([*asked, "--model", str(tmp_path / "gone")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def asked_of(checkpoints: Path, image: Path, out: Path, *more: str) -> list[str]:
    model = str(tiny_llava.build(SHAPE, checkpoints))
    return ["cam", "--model", model, "--image", str(image), "--prompt", PROMPT, "--answer", " w7",
            "--layers", "1", "--samples", "0", "--device", "cpu", "--out", str(out), *more]  # fmt: skip


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[CamRecord]:
    """What `vllm-flow cam` found, undrawn."""
    found: list[CamRecord] = []
    monkeypatch.setattr(cam_command, "write", lambda record, out: found.append(record) or [])
    return found


@pytest.mark.parametrize("orientation", [3, 6])
def test_cam_and_its_box_see_the_picture_as_shown(
    checkpoints: Path, tmp_path: Path, records: list[CamRecord], orientation: int
) -> None:
    """A picture that EXIF turns, beside one that is stored as shown."""
    stored = tiny_llava.picture(SHAPE, 3).resize((16, 8))
    data = Image.Exif()
    data[0x0112] = orientation
    stored.save(tmp_path / "turned.png", exif=data)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "turned.png"))
    shown.save(tmp_path / "shown.png", exif=Image.Exif())
    width, height = shown.size
    box = f"0,0,{width // 2},{height // 2}"
    for name in ("turned", "shown"):
        path = tmp_path / f"{name}.png"
        assert cli.main(asked_of(checkpoints, path, tmp_path / name, "--box", box)) == 0
    turned, plain = records
    assert (turned.view == plain.view).all() and (turned.heat == plain.heat).all()
    assert turned.box == plain.box and (turned.coverage == plain.coverage).all()
    assert turned.coverage is not None and turned.coverage[0, 0] == 1


def test_cam_puts_transparency_on_a_background(
    checkpoints: Path, tmp_path: Path, records: list[CamRecord]
) -> None:
    Image.new("RGBA", (16, 16), (200, 10, 10, 0)).save(tmp_path / "gone.png")
    for more, value in (([], 255), (["--background", "0,0,0"], 0)):
        assert cli.main(asked_of(checkpoints, tmp_path / "gone.png", tmp_path, *more)) == 0
        assert (records[-1].view == value).all()


def test_cam_refuses_a_picture_before_it_loads_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("vllm_flow.analysis.loading.load", load)
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "large.png").write_bytes(png_of(20_000, 10_000))
    tiny_llava.picture(SHAPE, 3).save(tmp_path / "x.png")
    for name, more, says in (
        ("gone.png", [], "gone.png: there is no such file"),
        ("text.png", [], "text.png: no picture of a kind that vLLM's server reads"),
        ("large.png", [], "large.png: more than 178956970 pixels"),
        ("x.png", ["--box", "0,0,17,4"], "not inside the picture of 16 x 16"),
    ):
        asked = ["cam", "--model", "m", "--image", str(tmp_path / name), "--prompt", PROMPT, *more]
        assert cli.main(asked) == 2
        said = capsys.readouterr().err
        assert said.startswith("vllm-flow cam: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("text", ["", "1,2", "1,2,256", "1,2,-3", "1,2,3,4", "white", "1,2,3²"])
def test_backgrounds_that_are_no_colour(text: str) -> None:
    with pytest.raises(Exception, match="is no colour: write red,green,blue"):
        colour(text)


def test_layers_and_boxes_as_they_are_typed() -> None:
    assert layer_numbers("all") is None
    assert layer_numbers("8,0,4,4") == (0, 4, 8)
    assert layer_numbers("0:30:10") == (0, 10, 20, 30) and layer_numbers("2:4") == (2, 3, 4)
    assert box_corners("1,2,3.5,4") == (1, 2, 3.5, 4)
    for bad in ("", "a", "4:2", "0:9:0", "1_6", "2²", "-1", "0:99999999999", "1:2:3:4", "9" * 5000):
        with pytest.raises(Exception, match="none of"):
            layer_numbers(bad)
    for bad in ("1,2,3", "nan,0,1,1", "0,0,inf,1"):
        with pytest.raises(Exception, match="left,top,right,bottom"):
            box_corners(bad)
